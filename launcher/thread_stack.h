#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace moemamba {

// The stack of the thread that makes this object, for another one to ask for: a signal interrupts
// it wherever it is, and it goes on at once. The object may be destroyed by that thread alone.
class ThreadStack {
 public:
  ThreadStack();
  ~ThreadStack();
  ThreadStack(const ThreadStack&) = delete;
  ThreadStack& operator=(const ThreadStack&) = delete;

  // By one other thread. Returns at once; the answer to the latest question is there a little
  // later, or never, where the thread is stuck in the kernel.
  void ask();
  // Innermost first, without the signal itself: a function of a library by its name, else
  // "file+0xoffset" of the call, as addr2line takes it.
  std::optional<std::vector<std::string>> answer() const;
  std::string kernel_state() const;  // "D (disk sleep)", of a thread that does not answer

 private:
  struct Shared;
  std::unique_ptr<Shared> shared_;
};

}  // namespace moemamba
