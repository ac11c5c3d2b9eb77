#pragma once
#include <atomic>
#include <vector>

#include "core/arena.h"
#include "parallel/communicator.h"
#include "parallel/device_work.h"
#include "parallel/layout.h"

namespace moemamba {
// letters: E experts in all, E' experts of this rank, M ranks of the expert group, D width,
// S = T K rows that this rank may send at most, C = exchange rows: capacity of one chunk

// Rows to the ranks that hold their experts, and back (house.md, decision 5). Received rows are
// numbered by (expert, source rank, source row); chunk i holds numbers [i C, (i + 1) C). Memory is
// C rows whatever the routing; more rows mean more chunks, agreed by the group (the maximum).
class ExpertExchange {
 public:
  // capacity: C >= 1. max_rows: S. Everything that plan() writes is allocated here, a GPU's memory
  // by the first plan(). device: where the streams of all calls work (dry ones aside).
  ExpertExchange(Communicator& group, const RankLayout& layout, int64_t capacity, int64_t max_rows,
                 DeviceKind device = DeviceKind::cpu);

  int64_t capacity() const { return capacity_; }
  // Chunks that a plan may need at most: ceil(M S / C) (what a dry run assumes is min(2, this)).
  int64_t most_chunks() const;

  // Shares offsets (i32 [E + 1], this rank's sorted rows) with the group. Host waits here; but not
  // on a GPU that has all experts and room for all rows: there nobody needs to know. `offsets` must
  // stay as they are for as long as the plan is used. On a dry stream: as if min(2, most_chunks())
  // chunks were full.
  void plan(Stream& stream, const Tensor& offsets);
  // What plan() has learnt, so that a backward pass needs not ask again.
  struct Plan {
    std::vector<int32_t> all_offsets;  // [M, E + 1]; none where nobody asked
    Tensor offsets;                    // what plan() was given
    int64_t chunks = 1, received = 0;
  };
  void keep(Plan& plan) const;  // the latest plan
  void use(const Plan& plan);   // is the latest plan again
  int64_t chunks() const { return chunks_; }       // of the latest plan; at least 1; same on all
  // Over all chunks; all that could come where nobody asked.
  int64_t received_rows() const { return received_; }

  // Whether nothing is exchanged: on a GPU that has all experts and room for all rows. Then rows
  // may be the first ones of a chunk, and a chunk the staging: what lies there is not copied.
  bool rows_stay() const;

  // rows[S, D] (sorted by expert) -> out.values[C, D], out.offsets[E' + 1] of chunk `chunk`.
  // staging: [C, D].
  void dispatch(Stream& stream, int64_t chunk, const Tensor& rows, const Rows& out,
                const Tensor& staging) const;
  // The way back: rows.values of chunk `chunk` -> their places in out[S, D] (other rows of out are
  // not touched).
  void combine(Stream& stream, int64_t chunk, const Rows& rows, const Tensor& out,
               const Tensor& staging) const;
  // Spent in exchanges since the last call; 0 on CUDA streams, whose work the host does not see.
  double take_seconds();
  // That came in plans since the last call, over all their chunks.
  int64_t take_rows();

 private:
  // Rows of this rank that one receiver gets, or rows of staging that one source fills.
  struct Interval {
    int64_t begin, end;
  };
  struct Move;  // rows between a tensor of sorted rows and a chunk: see the .cc

  int64_t number(int64_t source, int64_t expert) const {  // of this source's first row there
    return numbers_[size_t(source * layout_.experts() + expert)];
  }
  int64_t count(int64_t source, int64_t expert) const;
  Interval within(int64_t chunk, int64_t source, int64_t expert) const;
  void number_rows();
  void check_move(int64_t chunk, const Tensor& rows, const Tensor& local,
                  const Tensor& staging) const;
  void place(const Move& move) const;
  void gather_offsets(Stream& stream, const Tensor& offsets);
  void exchange(Stream& stream, const Move& move) const;
  void tell_begin(const Move& move) const;
  void tell_end() const;
  int64_t begin_of(int64_t chunk, int64_t expert) const;
  void copy_chunk(Stream& stream, const Move& move) const;
  void copy_on_device(Stream& stream, const Move& move) const;
  template <class Body>
  void for_parts(const Move& move, int64_t source, Body body) const;

  Communicator& group_;
  const RankLayout& layout_;
  int64_t capacity_, max_rows_, chunks_ = 1, received_ = 0;
  int64_t planned_rows_ = 0;  // since take_rows()
  DeviceKind device_;
  Tensor own_offsets_;            // as given to plan()
  Buffer gathered_, staging_;     // of a GPU: all ranks' offsets, and on their way to the host
  std::vector<int32_t> offsets_;  // [M, E + 1] of all ranks' sorted rows
  std::vector<int64_t> numbers_;  // [M, E] where they stand among their receiver's rows
  // Of the chunk that the stream is working on; [M] each. sent: this rank's rows, by receiver;
  // staged: rows of staging, by source. The bytes of the own rank are 0: its rows are copied once.
  mutable std::vector<Interval> sent_, staged_;
  mutable std::vector<int64_t> sent_places_, sent_bytes_, staged_places_, staged_bytes_;
  mutable std::vector<device_work::Segment> own_segments_, staged_segments_;
  mutable int64_t expected_ = 0;         // rows from other ranks
  mutable Phase before_{};               // what the stream was at before
  mutable std::vector<int32_t> begins_;  // [E' + 1] where experts begin within the chunk
  mutable std::chrono::steady_clock::time_point started_;  // touched by the stream's work alone
  mutable std::atomic<int64_t> nanoseconds_{0};
};

}  // namespace moemamba
