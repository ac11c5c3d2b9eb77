#include "tests/support/chromium.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "core/error.h"

namespace moemamba {

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;
constexpr auto kMostWait = std::chrono::seconds(60);

std::string decoded(const std::string& base64) {
  std::string bytes;
  uint32_t collected = 0;
  int bits = 0;
  for (const char c : base64) {
    const std::string_view digits =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const size_t digit = digits.find(c);
    if (digit == std::string_view::npos) break;
    collected = collected << 6 | uint32_t(digit);
    bits += 6;
    if (bits < 8) continue;
    bits -= 8;
    bytes += char(collected >> bits & 0xff);
  }
  return bytes;
}

// Becomes the browser, which reads calls from descriptor 3 and answers on 4.
[[noreturn]] void become(const char* const* words, int calls, int answers) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int in = fcntl(calls, F_DUPFD, 10), out = fcntl(answers, F_DUPFD, 10);
  dup2(in, 3);
  dup2(out, 4);
  const int nothing = open("/dev/null", O_RDWR);
  for (const int standard : {0, 1, 2}) dup2(nothing, standard);
  execv(words[0], const_cast<char* const*>(words));
  _exit(127);
}

}  // namespace

std::string Chromium::program() {
  for (const char* path : {"/usr/bin/chromium", "/usr/bin/chromium-browser"})
    if (access(path, X_OK) == 0) return path;
  return "";
}

Chromium::Chromium() {
  int calls[2], answers[2];
  check(pipe2(calls, O_CLOEXEC) == 0 && pipe2(answers, O_CLOEXEC) == 0, "no pipe");
  folder_ = (std::filesystem::temp_directory_path() / "moemamba-chromium-XXXXXX").string();
  check(mkdtemp(folder_.data()) != nullptr, folder_, ": cannot make folder");
  const std::string program = Chromium::program(), profile = "--user-data-dir=" + folder_;
  // Root has no sandbox, containers have a small /dev/shm.
  const char* const words[] = {program.c_str(),
                               "--headless=new",
                               "--no-sandbox",
                               "--disable-dev-shm-usage",
                               "--disable-gpu",
                               "--remote-debugging-pipe",
                               profile.c_str(),
                               "--no-first-run",
                               "--disable-background-networking",
                               "--disable-component-update",
                               "--disable-extensions",
                               "--disable-sync",
                               "--hide-scrollbars",
                               "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                               "about:blank",
                               nullptr};
  process_ = fork();
  check(process_ >= 0, "no process");
  if (process_ == 0) become(words, calls[0], answers[1]);
  close(calls[0]);
  close(answers[1]);
  to_ = calls[1];
  from_ = answers[0];
  const std::string target = call("Target.createTarget", {{"url", "about:blank"}})["targetId"];
  session_ = call("Target.attachToTarget", {{"targetId", target}, {"flatten", true}})["sessionId"];
  for (const char* domain : {"Page", "Runtime", "Network", "Log"})
    call(std::string(domain) + ".enable");
}

// Its processes end one after the other, and some write until then.
Chromium::~Chromium() {
  close(to_);
  close(from_);
  kill(-process_, SIGKILL);
  waitpid(process_, nullptr, 0);
  std::error_code error;
  for (int i = 0; i < 100; ++i) {
    std::filesystem::remove_all(folder_, error);
    if (!error) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

Json Chromium::receive() {
  const auto until = Clock::now() + kMostWait;
  for (;;) {
    const size_t end = bytes_.find('\0');
    if (end != std::string::npos) {
      Json message = Json::parse(bytes_.substr(0, end));
      bytes_.erase(0, end + 1);
      return message;
    }
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    pollfd waits{.fd = from_, .events = POLLIN, .revents = 0};
    check(left > 0 && poll(&waits, 1, int(left)) > 0, "Chromium says nothing for ",
          kMostWait.count(), " s");
    char some[65536];
    const ssize_t got = read(from_, some, sizeof some);
    check(got > 0, "Chromium has ended");
    bytes_.append(some, size_t(got));
  }
}

void Chromium::note(const Json& event) {
  const std::string method = event.value("method", "");
  const Json parameters = event.value("params", Json::object());
  if (method == "Network.requestWillBeSent")
    requests_.push_back(parameters["request"]["url"]);
  else if (method == "Runtime.exceptionThrown")
    complaints_.push_back(parameters["exceptionDetails"].dump());
  else if (method == "Runtime.consoleAPICalled" &&
           (parameters["type"] == "error" || parameters["type"] == "warning"))
    complaints_.push_back(parameters["args"].dump());
  else if (method == "Log.entryAdded" &&
           (parameters["entry"]["level"] == "error" || parameters["entry"]["level"] == "warning"))
    complaints_.push_back(parameters["entry"].dump());
}

Json Chromium::call(const std::string& method, Json parameters) {
  Json message = {{"id", ++calls_}, {"method", method}, {"params", std::move(parameters)}};
  if (!session_.empty()) message["sessionId"] = session_;
  const std::string text = message.dump() + '\0';
  for (size_t at = 0; at < text.size();) {
    const ssize_t sent = write(to_, text.data() + at, text.size() - at);
    check(sent > 0, "Chromium has ended");
    at += size_t(sent);
  }
  for (;;) {
    const Json answer = receive();
    if (!answer.contains("id")) {
      note(answer);
      continue;
    }
    check(answer["id"] == calls_, "an answer to another call: ", answer.dump());
    check(!answer.contains("error"), method, ": ", answer.dump());
    return answer["result"];
  }
}

void Chromium::open(const std::string& url, const Look& look) {
  call("Emulation.setDeviceMetricsOverride", {{"width", look.width},
                                              {"height", look.height},
                                              {"deviceScaleFactor", 1},
                                              {"mobile", false}});
  call("Emulation.setEmulatedMedia",
       {{"features", Json::array({{{"name", "prefers-color-scheme"},
                                   {"value", look.dark ? "dark" : "light"}}})}});
  call("Page.navigate", {{"url", "about:blank"}});
  complaints_.clear();
  requests_.clear();
  const Json went = call("Page.navigate", {{"url", url}});
  check(!went.contains("errorText"), url, ": ", went.value("errorText", ""));
}

Json Chromium::value(const std::string& expression) {
  const Json found =
      call("Runtime.evaluate",
           {{"expression", expression}, {"returnByValue", true}, {"awaitPromise", true}});
  check(!found.contains("exceptionDetails"), expression, ": ",
        found.value("exceptionDetails", Json()).dump());
  return found["result"].value("value", Json());
}

bool Chromium::becomes(const std::string& expression) {
  const auto until = Clock::now() + kMostWait;
  while (value(expression) != true) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return true;
}

void Chromium::press(const std::string& key) {
  for (const char* type : {"keyDown", "keyUp"})
    call("Input.dispatchKeyEvent", {{"type", type}, {"key", key}, {"code", key}});
}

void Chromium::point_at(double x, double y) {
  call("Input.dispatchMouseEvent", {{"type", "mouseMoved"}, {"x", x}, {"y", y}});
}

std::string Chromium::png() {
  const Json size = call("Page.getLayoutMetrics")["cssContentSize"];
  return decoded(call("Page.captureScreenshot", {{"format", "png"},
                                                 {"captureBeyondViewport", true},
                                                 {"clip",
                                                  {{"x", 0},
                                                   {"y", 0},
                                                   {"width", size["width"]},
                                                   {"height", size["height"]},
                                                   {"scale", 1}}}})["data"]);
}

}  // namespace moemamba
