#include "launcher/stop_signals.h"

#include <unistd.h>

#include <cstdio>
#include <exception>

namespace moemamba {

namespace {

constexpr int kStopSignals[] = {SIGINT, SIGTERM, SIGUSR1};

// Runs on a thread that was there before main() (OpenBLAS') and so does not block the signal: from
// now on it does, and the signal goes to the process once more, where only the watcher takes it.
void hand_back(int signal, siginfo_t*, void* context) {
  sigaddset(&static_cast<ucontext_t*>(context)->uc_sigmask, signal);
  kill(getpid(), signal);
}

void set_handlers(const sigset_t& signals, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  for (int signal : kStopSignals)
    if (sigismember(&signals, signal)) sigaction(signal, &action, nullptr);
}

void set_hand_back(const sigset_t& signals) {
  struct sigaction action {};
  action.sa_sigaction = hand_back;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  for (int signal : kStopSignals)
    if (sigismember(&signals, signal)) sigaction(signal, &action, nullptr);
}

}  // namespace

sigset_t stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : kStopSignals) {
    struct sigaction now {};
    sigaction(signal, nullptr, &now);
    if (now.sa_handler != SIG_IGN) sigaddset(&signals, signal);
  }
  return signals;
}

const char* signal_name(int signal) {
  return signal == SIGINT    ? "SIGINT"
         : signal == SIGTERM ? "SIGTERM"
         : signal == SIGUSR1 ? "SIGUSR1"
                             : "a signal";
}

StopSignals::StopSignals(std::string notice)
    : signals_(stop_signals()), notice_(std::move(notice)) {
  sigaddset(&signals_, SIGUSR2);  // the destructor's word to the watcher
  pthread_sigmask(SIG_BLOCK, &signals_, &before_);
  set_hand_back(signals_);
  watcher_ = std::thread([this] { watch(); });
}

StopSignals::~StopSignals() {
  ends_ = true;
  pthread_kill(watcher_.native_handle(), SIGUSR2);
  watcher_.join();
  // What was to be ended has ended. After a failure, though, mpirun may end this process.
  set_handlers(signals_, std::uncaught_exceptions() > 0 ? SIG_DFL : SIG_IGN);
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

void StopSignals::watch() {
  sigset_t wakes;
  sigemptyset(&wakes);
  sigaddset(&wakes, SIGUSR2);
  while (!ends_) {
    const int signal = sigwaitinfo(received_ ? &wakes : &signals_, nullptr);
    if (signal <= 0 || signal == SIGUSR2) continue;  // interrupted; the destructor
    received_ = signal;
    std::fputs(notice_.c_str(), stderr);
    if (!outlasts_repeats()) return;
    set_handlers(signals_, SIG_DFL);
    sigset_t next = signals_;
    sigdelset(&next, SIGUSR2);
    pthread_sigmask(SIG_UNBLOCK, &next, nullptr);  // here the next one takes its effect
  }
}

// False: the destructor has called meanwhile.
bool StopSignals::outlasts_repeats() {
  const auto end = std::chrono::steady_clock::now() + kRepeatedSignals;
  for (;;) {
    const auto left = end - std::chrono::steady_clock::now();
    if (left.count() <= 0) return true;
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
    const timespec patience{time_t(ns / 1'000'000'000), long(ns % 1'000'000'000)};
    const int signal = sigtimedwait(&signals_, nullptr, &patience);
    if (ends_) return false;
    if (signal == SIGINT) {  // a person's: it counts, and comes again below
      kill(getpid(), SIGINT);
      return true;
    }
  }
}

}  // namespace moemamba
