#pragma once
#include <functional>
#include <map>
#include <string>

#include "launcher/supervisor/status_facts.h"
#include "launcher/supervisor/status_http.h"
#include "launcher/supervisor/status_page.h"

namespace moemamba {

// Which request gets which answer, and who may ask (docs/status_server.md).
class StatusAnswers {
 public:
  static constexpr double kMostMade = 20;  // answers that take time, in a second

  struct Access {
    std::string token;     // empty: none is asked for
    bool loopback = true;  // only this machine can connect: Host must name it, so that no page of
                           // another origin reads this one under a name of its own
  };
  // now: seconds as in RunView. All that is given must outlive this.
  StatusAnswers(const RunView& view, const RunRecords& records, std::function<double()> now,
                Access access);

  HttpAnswer answer(const HttpRequest& request, const StatusCounts& counts);

 private:
  struct Kept {
    double until = -1;
    std::shared_ptr<const std::string> body;
  };
  bool may_ask(const HttpRequest& request) const;
  HttpAnswer kept(const std::string& name, const char* type,
                  const std::function<std::string()>& make);

  const RunView& view_;
  const RunRecords& records_;
  const StatusPage page_ = make_status_page();
  std::function<double()> now_;
  Access access_;
  std::string token_digest_, key_;
  std::map<std::string, Kept> kept_;
  double allowance_ = kMostMade, made_ = 0;  // answers that may be made now; when the latest was
};

}  // namespace moemamba
