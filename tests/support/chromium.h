#pragma once
#include <sys/types.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace moemamba {

// A headless Chromium with one page, told what to do over the DevTools protocol on a pipe. Errors
// of the browser are Errors. It reaches nothing but this machine.
class Chromium {
 public:
  static std::string program();  // empty: none is installed

  Chromium();
  ~Chromium();
  Chromium(const Chromium&) = delete;
  Chromium& operator=(const Chromium&) = delete;

  struct Look {
    int width = 1600, height = 1000;
    bool dark = false;
  };
  void open(const std::string& url, const Look& look);
  void open(const std::string& url) { open(url, {}); }
  // The value of a JavaScript expression; one that throws is an Error.
  nlohmann::json value(const std::string& expression);
  // Until the expression is true, at most a minute; false: it did not come true.
  bool becomes(const std::string& expression);
  void press(const std::string& key);  // "ArrowLeft", "Tab"
  void point_at(double x, double y);
  std::string png();  // of the whole page

  // Since open(): errors and warnings on the console, exceptions, refusals of the browser.
  const std::vector<std::string>& complaints() const { return complaints_; }
  const std::vector<std::string>& requests() const { return requests_; }  // addresses

 private:
  nlohmann::json call(const std::string& method,
                      nlohmann::json parameters = nlohmann::json::object());
  nlohmann::json receive();
  void note(const nlohmann::json& event);
  std::string folder_;  // its profile
  pid_t process_ = -1;
  int to_ = -1, from_ = -1;
  std::string bytes_, session_;
  int64_t calls_ = 0;
  std::vector<std::string> complaints_, requests_;
};

}  // namespace moemamba
