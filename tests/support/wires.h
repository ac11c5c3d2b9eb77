#pragma once
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>

#include "parallel/communicator.h"

namespace moemamba {

// Another communicator, owned; what a test changes of it is in the two kinds of wires below.
class Wire : public Communicator {
 public:
  explicit Wire(std::unique_ptr<Communicator> inner) : inner_(std::move(inner)) {}
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  const std::string& name() const override { return inner_->name(); }
  void all_to_all(Stream& stream, const AllToAll& call) override {
    inner_->all_to_all(stream, call);
  }
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    inner_->all_gather(stream, send, recv, bytes);
  }
  void poll() override { inner_->poll(); }
  void abort(const std::string& why) noexcept override { inner_->abort(why); }

 private:
  std::unique_ptr<Communicator> inner_;
};

enum class CallKind { all_to_all, all_gather };

// Calls before(kind, number) on the stream ahead of each call; number counts the calls of a kind.
class WatchedWire final : public Wire {
 public:
  using Watcher = std::function<void(CallKind kind, int64_t number)>;
  WatchedWire(std::unique_ptr<Communicator> inner, Watcher before)
      : Wire(std::move(inner)), before_(std::move(before)) {}
  void all_to_all(Stream& stream, const AllToAll& call) override {
    stream.submit([this, n = exchanges_++] { before_(CallKind::all_to_all, n); });
    Wire::all_to_all(stream, call);
  }
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    stream.submit([this, n = gathers_++] { before_(CallKind::all_gather, n); });
    Wire::all_gather(stream, send, recv, bytes);
  }

 private:
  Watcher before_;
  int64_t exchanges_ = 0, gathers_ = 0;
};

// Leaves out one call of every `period` calls of a kind, on all members alike: of an all-to-all
// each member gets zeros (in a sum: nothing from the others), of an all-gather its own part alone.
class ForgetfulWire final : public Wire {
 public:
  ForgetfulWire(std::unique_ptr<Communicator> inner, CallKind kind, int64_t period, int64_t which)
      : Wire(std::move(inner)), kind_(kind), period_(period), which_(which) {}
  void all_to_all(Stream& stream, const AllToAll& call) override {
    if (!forgets(CallKind::all_to_all)) return Wire::all_to_all(stream, call);
    stream.submit([this, call] {
      for (int r = 0; r < size(); ++r)
        std::memset(static_cast<char*>(call.recv) + call.recv_offsets[r], 0,
                    size_t(call.recv_bytes[r]));
    });
  }
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    if (!forgets(CallKind::all_gather)) return Wire::all_gather(stream, send, recv, bytes);
    stream.submit([this, send, recv, bytes] {
      std::memmove(static_cast<char*>(recv) + rank() * bytes, send, size_t(bytes));
    });
  }
  int64_t forgotten() const { return forgotten_; }

 private:
  bool forgets(CallKind kind) {
    const bool now = kind == kind_ && calls_++ % period_ == which_;
    forgotten_ += now;
    return now;
  }
  CallKind kind_;
  int64_t period_, which_, calls_ = 0, forgotten_ = 0;
};

// Something that happened once; waiting for it ends after 20 s, which a test takes for never.
class Milestone {
 public:
  void reach() {
    std::lock_guard lock(mutex_);
    reached_ = true;
    changed_.notify_all();
  }
  bool wait() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return reached_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
};

}  // namespace moemamba
