#include "launcher/agent_parts.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "runtime/control_wire.h"
#include "runtime/process_facts.h"

namespace moemamba {

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;

int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

}  // namespace

double boot_seconds() {
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

std::optional<tcp::endpoint> endpoint_of(const std::string& text) {
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos) return std::nullopt;
  std::string host = text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']')
    host = host.substr(1, host.size() - 2);
  boost::system::error_code error;
  const auto address = asio::ip::make_address(host, error);
  const int port = std::atoi(text.c_str() + colon + 1);
  if (error || port < 1 || port > 65535) return std::nullopt;
  return tcp::endpoint(address, uint16_t(port));
}

AddressLookup::AddressLookup(const std::string& path) : found_(std::make_shared<Found>()) {
  std::thread([found = found_, path] {
    std::ifstream file(path);
    std::getline(file, found->text);
    found->done = true;
  }).detach();
}

std::thread quiet_thread(std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(std::move(body));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

Hello hello_of_this_process() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  Hello hello;
  hello.set_protocol(kControlProtocol);
  hello.set_host(host);
  hello.set_pid(getpid());
  hello.set_pid_started(process_start(getpid()));
  hello.set_boot_id(boot_id());
  return hello;
}

ControlWord heartbeat_word(uint64_t number, const Activity::Now& now, int64_t gpu_bytes) {
  ControlWord word;
  Heartbeat& beat = *word.mutable_heartbeat();
  beat.set_number(number);
  beat.set_phase(int32_t(now.phase));
  beat.set_step(now.step);
  beat.set_layer(now.layer);
  beat.set_collective(now.collective);
  beat.set_group(now.group);
  beat.set_in_collective(now.in_collective);
  beat.set_rows_expected(now.rows_expected);
  beat.set_rows_received(now.rows_received);
  beat.set_progress(now.progress);
  beat.set_resident_bytes(resident_bytes());
  beat.set_gpu_bytes(gpu_bytes);
  return word;
}

}  // namespace moemamba
