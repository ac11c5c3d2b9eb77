// What a stranger sends to the status port: requests one after the other, and their answers.
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "launcher/supervisor/status_answers.h"
#include "launcher/supervisor/status_http.h"
#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

// Besides its text a field is a node of Beast's, and there may be a hundred; the text is there once
// as it came, in a buffer that doubles, and once in the nodes.
constexpr int64_t kMore = 8 << 10;

void read_within_bounds(std::string_view stream) {
  AllocationLimit limit(std::min(stream.size(), kMostHeaderBytes), 5, kMore);
  RequestReader reader;
  reader.feed(stream);
}

// Requests that ask for as much as they can: the inputs of libFuzzer are short.
bool read_greedy() {
  const std::string begin = "GET / HTTP/1.1\r\nHost: localhost\r\n";
  for (const size_t length : {1, 5, 72}) {
    const std::string field = concat("a: ", std::string(length, 'x'), "\r\n");
    std::string fields;
    for (int i = 0; i < kMostHeaderFields + 10; ++i) {
      fields += field;
      read_within_bounds(begin + fields + "\r\n");
    }
  }
  read_within_bounds(begin + "a: " + std::string(100000, 'x') + "\r\n\r\n");
  read_within_bounds("GET /" + std::string(2040, 'a') + " HTTP/1.1\r\nHost: a\r\n\r\n");
  read_within_bounds(begin + "Connection: " + std::string(7000, ',') + "\r\n\r\n");
  read_within_bounds(begin + "Content-Length: " + std::string(7000, '0') + "\r\n\r\n");
  return true;
}

// A run with something to say in every answer.
struct Scene {
  Scene() {
    view.of_ranks.resize(2);
    view.experts = {.step = 1, .dropped_rows = 0, .layers = 1, .experts = 2, .choices = {1, 0}};
    view.events = {{1, "started", -1, "a \"text\""}};
  }
  RunView view;
  RunRecords records{"/nonexistent"};
};

using Result = std::variant<HttpRequest, HttpAnswer>;

std::string text_of(const Result& result) {
  if (const auto* answer = std::get_if<HttpAnswer>(&result))
    return concat(answer->status, " ", *answer->body, answer->fields);
  const auto& r = std::get<HttpRequest>(result);
  return concat(r.head, "|", r.path, "|", r.query, "|", r.host, "|", r.bearer, "|", r.keep_alive);
}

// The requests of a stream up to a refusal, cut into pieces; and how many bytes these were.
std::vector<std::string> read(std::string_view stream, size_t piece, size_t* taken) {
  std::vector<std::string> results;
  RequestReader reader;
  *taken = 0;
  while (*taken < stream.size()) {
    *taken += reader.feed(stream.substr(*taken, piece));
    if (!reader.done()) continue;
    results.push_back(text_of(reader.result()));
    if (std::holds_alternative<HttpAnswer>(reader.result())) break;
    reader = RequestReader();
  }
  return results;
}

void expect_request(const HttpRequest& request, std::string_view bytes) {
  require(bytes.ends_with("\r\n\r\n") && bytes.size() <= kMostHeaderBytes, "it is a whole header");
  require(bytes.starts_with(request.head ? "HEAD /" : "GET /"),
          "its method is the one that is sent");
  require(request.path.starts_with("/"), "it asks for a path");
  const std::string target =
      request.path + (bytes.substr(0, bytes.find('\r')).find('?') == std::string_view::npos
                          ? ""
                          : "?" + request.query);
  require(bytes.find(" " + target + " HTTP/1.") != std::string_view::npos,
          "the target is the one that is sent");
  for (const std::string& text : {request.path, request.query, request.host, request.bearer})
    require(text.find_first_of("\r\n\0", 0, 3) == std::string::npos, "texts are within a line");
}

void expect_answer(const HttpAnswer& answer) {
  const std::string header = header_of(answer, false);
  require(header.find("\r\n\r\n") == header.size() - 4, "a header has one end");
  require(header.starts_with(concat("HTTP/1.1 ", answer.status, " ")), "a header has a status");
  require(
      header.find(concat("\r\nContent-Length: ", answer.body->size(), "\r\n")) != std::string::npos,
      "the length is that of the body");
  if (answer.type == "application/json")
    require(!nlohmann::json::parse(*answer.body, nullptr, false).is_discarded(), "JSON is JSON");
}

void answer(const HttpRequest& request) {
  static const Scene scene;
  static double now = 0;
  static StatusAnswers open(scene.view, scene.records, [] { return now; }, {});
  static StatusAnswers closed(scene.view, scene.records, [] { return now; },
                              {.token = "0123456789abcdef", .loopback = false});
  now += 0.1;
  const HttpAnswer given = open.answer(request, {});
  expect_answer(given);
  const HttpAnswer guarded = closed.answer(request, {});
  expect_answer(guarded);
  const bool knows =
      request.bearer == "0123456789abcdef" ||
      (request.bearer.empty() && query_value(request.query, "token") == "0123456789abcdef");
  require((guarded.status == 401) == !knows, "who knows the token gets in, and nobody else");
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  const std::string_view stream(reinterpret_cast<const char*>(data), size);
  static const bool greedy = read_greedy();
  require(greedy, "greedy requests were read");
  read_within_bounds(stream);
  size_t taken = 0, taken_by_bytes = 0;
  require(
      read(stream, size + 1, &taken) == read(stream, 1, &taken_by_bytes) && taken == taken_by_bytes,
      "however it comes, it is the same");
  RequestReader reader;
  const size_t first = reader.feed(stream);
  if (!reader.done()) return 0;
  if (const auto* request = std::get_if<HttpRequest>(&reader.result())) {
    expect_request(*request, stream.substr(0, first));
    answer(*request);
  } else {
    expect_answer(std::get<HttpAnswer>(reader.result()));
  }
  return 0;
}
