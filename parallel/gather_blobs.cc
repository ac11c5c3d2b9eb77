#include "parallel/gather_blobs.h"

#include <numeric>

namespace moemamba {

namespace {

std::vector<int64_t> gather_sizes(Communicator& group, Stream& stream, int64_t own) {
  std::vector<int64_t> sizes(size_t(group.size()));
  group.all_gather(stream, &own, sizes.data(), sizeof own);
  stream.synchronize();
  return sizes;
}

}  // namespace

std::vector<std::string> gather_blobs(Communicator& group, Stream& stream, const std::string& own) {
  const size_t N = size_t(group.size());
  const bool first = group.rank() == 0;
  const std::vector<int64_t> sizes = gather_sizes(group, stream, int64_t(own.size()));
  std::vector<int64_t> places(N), none(N), sends(N), gets(N);
  sends[0] = int64_t(own.size());
  std::string all;
  if (first) {
    gets = sizes;
    std::exclusive_scan(sizes.begin(), sizes.end(), places.begin(), int64_t{0});
    all.resize(size_t(std::accumulate(sizes.begin(), sizes.end(), int64_t{0})));
  }
  group.all_to_all(stream, {.send = own.data(),
                            .send_offsets = none.data(),
                            .send_bytes = sends.data(),
                            .recv = all.data(),
                            .recv_offsets = places.data(),
                            .recv_bytes = gets.data()});
  stream.synchronize();
  std::vector<std::string> blobs;
  for (size_t r = 0; first && r < N; ++r)
    blobs.push_back(all.substr(size_t(places[r]), size_t(sizes[r])));
  return blobs;
}

std::string broadcast_blob(Communicator& group, Stream& stream, const std::string& own) {
  const size_t N = size_t(group.size());
  const bool first = group.rank() == 0;
  const int64_t size = gather_sizes(group, stream, int64_t(first ? own.size() : 0))[0];
  std::vector<int64_t> none(N), sends(N, first ? size : 0), gets(N);
  gets[0] = size;
  std::string blob(size_t(size), '\0');
  group.all_to_all(stream, {.send = own.data(),
                            .send_offsets = none.data(),
                            .send_bytes = sends.data(),
                            .recv = blob.data(),
                            .recv_offsets = none.data(),
                            .recv_bytes = gets.data()});
  stream.synchronize();
  return blob;
}

}  // namespace moemamba
