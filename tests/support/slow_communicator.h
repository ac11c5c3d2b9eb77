#pragma once
#include <thread>

#include "parallel/communicator.h"

namespace moemamba {

// Another communicator behind a slow wire: sleeps on the stream before each call.
class SlowCommunicator final : public Communicator {
 public:
  SlowCommunicator(Communicator& inner, std::chrono::milliseconds delay)
      : inner_(inner), delay_(delay) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  const std::string& name() const override { return inner_.name(); }
  void all_to_all(Stream& stream, const AllToAll& call) override {
    sleep(stream);
    inner_.all_to_all(stream, call);
  }
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    sleep(stream);
    inner_.all_gather(stream, send, recv, bytes);
  }
  void abort(const std::string& why) noexcept override { inner_.abort(why); }

 private:
  void sleep(Stream& stream) const {
    stream.submit([delay = delay_] { std::this_thread::sleep_for(delay); });
  }
  Communicator& inner_;
  std::chrono::milliseconds delay_;
};

}  // namespace moemamba
