#include "launcher/supervisor/status_http.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/error.h"

namespace moemamba {
namespace {

std::variant<HttpRequest, HttpAnswer> read_whole(const std::string& bytes) {
  RequestReader reader;
  reader.feed(bytes);
  if (!reader.done()) return plain_answer(0, "incomplete");
  return reader.result();
}

int status_of(const std::string& bytes) {
  const auto result = read_whole(bytes);
  const auto* refused = std::get_if<HttpAnswer>(&result);
  return refused ? refused->status : 200;
}

HttpRequest request_in(const std::string& bytes) {
  const auto result = read_whole(bytes);
  if (const auto* refused = std::get_if<HttpAnswer>(&result)) {
    ADD_FAILURE() << bytes << ": " << refused->status << " " << *refused->body;
    return {};
  }
  return std::get<HttpRequest>(result);
}

// A request with `fields` behind its Host.
std::string get(const std::string& fields) {
  return "GET / HTTP/1.1\r\nHost: localhost\r\n" + fields + "\r\n";
}

TEST(StatusHttp, ReadsWhatBrowsersSend) {
  const HttpRequest request = request_in(
      "GET /api/curves?from=10&x HTTP/1.1\r\nHost: LocalHost:8080\r\nConnection: keep-alive\r\n"
      "Authorization: Bearer abc.DEF-1\r\nAccept: text/html,application/xhtml+xml;q=0.9,*/*\r\n"
      "Accept-Language: de-DE,de;q=0.9\r\nsec-ch-ua: \"Not;A=Brand\";v=\"8\"\r\n\r\n");
  EXPECT_FALSE(request.head);
  EXPECT_EQ(request.path, "/api/curves");
  EXPECT_EQ(request.query, "from=10&x");
  EXPECT_EQ(request.host, "localhost");
  EXPECT_EQ(request.bearer, "abc.DEF-1");
  EXPECT_TRUE(request.keep_alive);
  EXPECT_TRUE(request_in("HEAD / HTTP/1.1\r\nHost: [::1]:1\r\n\r\n").head);
  EXPECT_EQ(request_in("HEAD / HTTP/1.1\r\nHost: [::1]:1\r\n\r\n").host, "::1");
}

TEST(StatusHttp, KeepsAConnectionAsTheVersionSays) {
  EXPECT_TRUE(request_in(get("")).keep_alive);
  EXPECT_FALSE(request_in(get("Connection: close\r\n")).keep_alive);
  EXPECT_FALSE(request_in("GET / HTTP/1.0\r\n\r\n").keep_alive);
  EXPECT_TRUE(request_in("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive);
}

TEST(StatusHttp, IsTheSameHoweverTheBytesAreCut) {
  const std::string request = get("Authorization: Bearer x\r\nContent-Length: 0\r\n");
  for (size_t cut = 0; cut <= request.size(); ++cut) {
    RequestReader reader;
    EXPECT_EQ(reader.feed(std::string_view(request).substr(0, cut)), cut);
    EXPECT_EQ(reader.done(), cut == request.size());
    EXPECT_EQ(reader.feed(std::string_view(request).substr(cut)), request.size() - cut);
    ASSERT_TRUE(reader.done());
    EXPECT_EQ(std::get<HttpRequest>(reader.result()).bearer, "x");
  }
}

TEST(StatusHttp, LeavesWhatFollowsARequest) {
  RequestReader reader;
  EXPECT_EQ(reader.feed(get("") + "GET /next"), get("").size());
  EXPECT_TRUE(reader.done());
  EXPECT_EQ(reader.feed("more"), 0u);
}

struct Hostile {
  int status;
  const char* what;
  std::string bytes;
};

std::vector<Hostile> hostile_requests() {
  std::string many;
  for (int i = 0; i < kMostHeaderFields; ++i) many += concat("a", i, ":\r\n");
  const std::string line = "GET / HTTP/1.1\r\n";
  return {
      // Framing: what two servers might cut into requests in two ways.
      {400, "length and transfer coding",
       get("Content-Length: 0\r\nTransfer-Encoding: chunked\r\n")},
      {400, "transfer coding and length",
       get("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n")},
      {400, "transfer coding", get("Transfer-Encoding: chunked\r\n")},
      {400, "a coding nobody knows", get("Transfer-Encoding: xchunked\r\n")},
      {400, "a coding that hides", get("Transfer-Encoding: identity, chunked\r\n")},
      {400, "two lengths", get("Content-Length: 0\r\nContent-Length: 0\r\n")},
      {400, "two lengths that differ", get("Content-Length: 0\r\nContent-Length: 5\r\n")},
      {400, "a list of lengths", get("Content-Length: 0, 0\r\n")},
      {400, "a length with a sign", get("Content-Length: +0\r\n")},
      {400, "a negative length", get("Content-Length: -1\r\n")},
      {400, "a length in hexadecimal", get("Content-Length: 0x0\r\n")},
      {400, "no length", get("Content-Length:\r\n")},
      {400, "a length beyond 64 bits", get("Content-Length: 99999999999999999999\r\n")},
      {413, "a body", get("Content-Length: 5\r\n") + "hello"},
      {413, "a body that is claimed", get("Content-Length: 18446744073709551615\r\n")},
      {417, "an expectation", get("Expect: 100-continue\r\n")},
      // Lines.
      {400, "bare line feeds", "GET / HTTP/1.1\nHost: localhost\n\n"},
      {400, "one bare line feed", "GET / HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n"},
      {400, "a bare carriage return", get("X: a\rb\r\n")},
      {400, "two carriage returns", "GET / HTTP/1.1\r\r\nHost: localhost\r\n\r\n"},
      {400, "a folded line", get("X: a\r\n b\r\n")},
      {400, "a line folded by a tab", get("X: a\r\n\tb\r\n")},
      {400, "a blank before the first field", line + " Host: localhost\r\n\r\n"},
      {400, "a zero byte", get(std::string("X: a\0b\r\n", 8))},
      {400, "a control byte", get("X: a\x01\r\n")},
      {400, "a delete byte", get("X: a\x7f\r\n")},
      {400, "a byte beyond ASCII", get("X: \xc3\xa4\r\n")},
      {400, "a blank before the colon", get("X : a\r\n")},
      {400, "no colon", get("X\r\n")},
      {400, "no name", get(": a\r\n")},
      {400, "an empty line first", "\r\n" + get("")},
      {400, "the hello of TLS", std::string("\x16\x03\x01\x02\x00\x01\x00", 7)},
      {400, "nothing but blanks", " / HTTP/1.1\r\n\r\n"},
      // The first line.
      {405, "POST", "POST / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {405, "PUT", "PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {405, "DELETE", "DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {405, "OPTIONS", "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {405, "TRACE", "TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {405, "CONNECT", "CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {405, "a method nobody knows", "FETCH / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {400, "a method in small letters", "get / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {505, "HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
      {505, "a version to come", "GET / HTTP/2.0\r\nHost: localhost\r\n\r\n"},
      {505, "version 1.2", "GET / HTTP/1.2\r\nHost: localhost\r\n\r\n"},
      {505, "version 0.9", "GET / HTTP/0.9\r\n\r\n"},
      {400, "no version", "GET /\r\n\r\n"},
      {400, "two blanks", "GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {400, "no target", "GET HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {400, "a tab for a blank", "GET\t/ HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {400, "a whole address", "GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {400, "a relative path", "GET api HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {400, "a fragment", "GET /#x HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      {414, "a long target",
       "GET /" + std::string(2048, 'a') + " HTTP/1.1\r\nHost: localhost\r\n\r\n"},
      // Host.
      {400, "no host", line + "\r\n"},
      {400, "two hosts", get("Host: localhost\r\n")},
      {400, "an empty host", line + "Host:\r\n\r\n"},
      {400, "a host with a path", line + "Host: localhost/x\r\n\r\n"},
      {400, "a host with a user", line + "Host: me@localhost\r\n\r\n"},
      {400, "a port that is none", line + "Host: localhost:http\r\n\r\n"},
      {400, "a bracket alone", line + "Host: [::1\r\n\r\n"},
      {400, "words behind brackets", line + "Host: [::1]x\r\n\r\n"},
      {400, "two tokens", get("Authorization: Bearer a\r\nAuthorization: Bearer b\r\n")},
      // Size.
      {431, "too many fields", get(many)},
      {431, "a long header", get("X: " + std::string(kMostHeaderBytes, 'a') + "\r\n")},
      {431, "a line without end", "GET /" + std::string(kMostHeaderBytes, 'a')},
  };
}

TEST(StatusHttp, RefusesWhatIsHostile) {
  for (const Hostile& hostile : hostile_requests())
    EXPECT_EQ(status_of(hostile.bytes), hostile.status) << hostile.what;
}

// Cut at every byte, and byte by byte, the verdict is the same: no word is looked at alone.
TEST(StatusHttp, RefusesItHoweverTheBytesAreCut) {
  for (const Hostile& hostile : hostile_requests()) {
    RequestReader reader;
    size_t taken = 0;
    for (const char c : hostile.bytes) taken += reader.feed({&c, 1});
    ASSERT_TRUE(reader.done()) << hostile.what;
    const auto* refused = std::get_if<HttpAnswer>(&reader.result());
    ASSERT_TRUE(refused) << hostile.what;
    EXPECT_EQ(refused->status, hostile.status) << hostile.what;
    EXPECT_LE(taken, kMostHeaderBytes + 1) << hostile.what;
  }
}

TEST(StatusHttp, TakesAHeaderOfTheLargestSize) {
  const std::string rest = get("X: \r\n");
  EXPECT_EQ(status_of(get("X: " + std::string(kMostHeaderBytes - rest.size(), 'a') + "\r\n")), 200);
  EXPECT_EQ(status_of(get("X: " + std::string(kMostHeaderBytes - rest.size() + 1, 'a') + "\r\n")),
            431);
}

TEST(StatusHttp, PutsEveryAnswerUnderAPolicy) {
  const HttpAnswer answer = plain_answer(405, "No.", "Allow: GET, HEAD\r\n");
  const std::string header = header_of(answer, false);
  EXPECT_EQ(header.find("HTTP/1.1 405 Method Not Allowed\r\n"), 0u) << header;
  for (const char* field :
       {"\r\nContent-Length: 4\r\n", "\r\nContent-Type: text/plain; charset=utf-8\r\n",
        "\r\nCache-Control: no-store\r\n", "\r\nX-Content-Type-Options: nosniff\r\n",
        "\r\nContent-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\n",
        "\r\nReferrer-Policy: no-referrer\r\n", "\r\nAllow: GET, HEAD\r\n",
        "\r\nConnection: close\r\n"})
    EXPECT_NE(header.find(field), std::string::npos) << field << header;
  EXPECT_TRUE(header.ends_with("\r\n\r\n"));
  EXPECT_NE(header_of(answer, true).find("\r\nConnection: keep-alive\r\n"), std::string::npos);
}

TEST(StatusHttp, FindsValuesInAQuery) {
  EXPECT_EQ(query_value("from=10&token=abc", "from"), "10");
  EXPECT_EQ(query_value("from=10&token=abc", "token"), "abc");
  EXPECT_EQ(query_value("token=a&token=b", "token"), "a");
  EXPECT_EQ(query_value("token=", "token"), "");
  EXPECT_FALSE(query_value("mytoken=a", "token"));
  EXPECT_FALSE(query_value("token", "token"));
  EXPECT_FALSE(query_value("", "token"));
  EXPECT_FALSE(query_value("&&", "token"));
}

}  // namespace
}  // namespace moemamba
