#include "launcher/supervisor/status_answers.h"

#include <algorithm>
#include <charconv>

#include "core/digest.h"
#include "core/error.h"

namespace moemamba {

namespace {

constexpr double kKeptSeconds = 0.25;  // however many ask, an answer is made so often
constexpr size_t kMostKept = 8;
constexpr const char* kJson = "application/json";

bool is_this_machine(const std::string& host) {
  return host.empty() || host == "localhost" || host == "127.0.0.1" || host == "::1";
}

// The step in "from=STEP"; nothing: it is none.
std::optional<int64_t> step_of(const HttpRequest& request) {
  const auto value = query_value(request.query, "from");
  if (!value) return 0;
  int64_t step = 0;
  const auto [end, error] = std::from_chars(value->data(), value->data() + value->size(), step);
  const bool whole = error == std::errc() && end == value->data() + value->size();
  return whole && step >= 0 ? std::optional(step) : std::nullopt;
}

}  // namespace

StatusAnswers::StatusAnswers(const RunView& view, const RunRecords& records,
                             std::function<double()> now, Access access)
    : view_(view),
      records_(records),
      now_(std::move(now)),
      access_(std::move(access)),
      key_(random_bytes(32)) {
  token_digest_ = hmac_sha256(key_, access_.token);
}

// Digests are compared: they are of one length, whatever was sent.
bool StatusAnswers::may_ask(const HttpRequest& request) const {
  if (access_.token.empty()) return true;
  const std::string_view sent =
      request.bearer.empty() ? query_value(request.query, "token").value_or("") : request.bearer;
  return equal_in_constant_time(hmac_sha256(key_, sent), token_digest_);
}

HttpAnswer StatusAnswers::kept(const std::string& name, const char* type,
                               const std::function<std::string()>& make) {
  const double now = now_();
  if (const auto at = kept_.find(name); at != kept_.end() && now < at->second.until)
    return {.type = type, .body = at->second.body};
  allowance_ = std::min(kMostMade, allowance_ + (now - made_) * kMostMade);
  made_ = now;
  if (allowance_ < 1)
    return plain_answer(503, "Too many questions; ask again in a second.", "Retry-After: 1\r\n");
  --allowance_;
  if (kept_.size() >= kMostKept && !kept_.contains(name)) kept_.clear();
  Kept& kept = kept_[name];
  kept = {.until = now + kKeptSeconds, .body = std::make_shared<const std::string>(make())};
  return {.type = type, .body = kept.body};
}

HttpAnswer StatusAnswers::answer(const HttpRequest& request, const StatusCounts& counts) {
  if (access_.loopback && !is_this_machine(request.host))
    return plain_answer(421, "This server answers to localhost and 127.0.0.1 alone.");
  if (!may_ask(request))
    return plain_answer(401,
                        "A token is needed: \"Authorization: Bearer TOKEN\" or ?token=TOKEN; it "
                        "stands in the file that launch.status_token_file names.",
                        "WWW-Authenticate: Bearer\r\n");
  const std::string& path = request.path;
  if (path == "/")
    return {.type = "text/html; charset=utf-8", .body = page_.html, .fields = page_.fields};
  if (path == "/healthz") {
    const Health health = health_of(view_);
    return plain_answer(health.good ? 200 : 503, health.text);
  }
  if (path == "/metrics")
    return kept(path, "text/plain; version=0.0.4; charset=utf-8",
                [&] { return metrics_text(view_, records_.state(), counts, now_()); });
  if (path == "/api/status")
    return kept(path, kJson, [&] { return status_json(view_, records_.state(), now_()); });
  if (path == "/api/samples") return kept(path, kJson, [&] { return samples_json(records_); });
  if (path == "/api/curves") {
    const std::optional<int64_t> from = step_of(request);
    if (!from) return plain_answer(400, "from must be a step: /api/curves?from=1000");
    return kept(concat(path, *from), kJson, [&] { return curves_json(records_, *from); });
  }
  return plain_answer(404,
                      "There are /, /healthz, /metrics, /api/status, /api/curves?from=STEP and "
                      "/api/samples.");
}

}  // namespace moemamba
