#include "launcher/supervisor/status_server.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <fstream>
#include <sstream>
#include <vector>

#include "core/schema.h"
#include "tests/support/http_client.h"
#include "tests/support/status_scene.h"

namespace moemamba {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

const std::string kRequest = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";

TEST(StatusServer, AnswersOnThisMachineAlone) {
  StatusScene scene;
  EXPECT_EQ(scene.url(), concat("http://127.0.0.1:", scene.port(), "/"));
  const std::string answer = http_get(scene.port(), "/healthz");
  EXPECT_EQ(http_status(answer), 200);
  EXPECT_EQ(http_body(answer), "training\n");
  EXPECT_EQ(http_field(answer, "Connection"), "close");
}

// As the system has it: the address in hexadecimal, as the machine's byte order turns it.
TEST(StatusServer, ListensOnOneAddress) {
  StatusScene scene;
  char port[8];
  std::snprintf(port, sizeof port, ":%04X", unsigned(scene.port()));
  std::string listens;
  for (const char* table : {"/proc/self/net/tcp", "/proc/self/net/tcp6"}) {
    std::ifstream lines(table);
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string number, local, remote, state;
      words >> number >> local >> remote >> state;
      if (state == "0A" && local.ends_with(port)) listens += local + " ";
    }
  }
  EXPECT_EQ(listens, concat("0100007F", port, " "));
}

TEST(StatusServer, KeepsToTheLimitsThatAreDocumented) {
  const StatusOptions options;
  EXPECT_EQ(options.address, "127.0.0.1");
  EXPECT_EQ(options.header_seconds, 5);
  EXPECT_EQ(options.connections, 64u);
}

TEST(StatusServer, AnswersRequestAfterRequestOfAConnection) {
  StatusScene scene;
  HttpClient client(scene.port());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client.send(kRequest));
    EXPECT_EQ(http_status(client.read_answer()), 200);
  }
  ASSERT_TRUE(client.send(kRequest + kRequest + kRequest));  // before the first one is answered
  for (int i = 0; i < 3; ++i) EXPECT_EQ(http_body(client.read_answer()), "training\n");
}

TEST(StatusServer, SendsNoBodyToHead) {
  StatusScene scene;
  HttpClient client(scene.port());
  client.send("HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
  const std::string answer = client.read_all().value_or("");
  EXPECT_EQ(http_status(answer), 200);
  EXPECT_GT(std::stoi(http_field(answer, "Content-Length")), 100);
  EXPECT_EQ(http_body(answer), "");
}

TEST(StatusServer, EndsAConnectionAfterARefusal) {
  StatusScene scene;
  for (const std::string refused :
       {"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
        "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET / HTTP/1.1\nHost: localhost\n\n"}) {
    HttpClient client(scene.port());
    client.send(refused + kRequest);
    const std::optional<std::string> answer = client.read_all();
    ASSERT_TRUE(answer) << refused;
    EXPECT_GE(http_status(*answer), 400) << refused;
    EXPECT_EQ(http_field(*answer, "Connection"), "close");
    EXPECT_EQ(answer->find("HTTP/1.1", 1), std::string::npos) << "a second answer: " << *answer;
  }
}

// Each byte comes well before the deadline, and none of them moves it.
TEST(StatusServer, EndsARequestThatTricklesIn) {
  StatusScene scene({.header_seconds = 0.5});
  HttpClient client(scene.port());
  const auto start = Clock::now();
  client.send("GET / HTTP/1.1\r\nX: ");
  bool open = true;
  while (open && Clock::now() - start < 60s) open = client.send("a") && !client.closed(20ms);
  EXPECT_FALSE(open);
  EXPECT_GE(Clock::now() - start, 500ms);
}

TEST(StatusServer, EndsConnectionsThatSayNothing) {
  StatusScene scene({.header_seconds = 0.3});
  HttpClient silent(scene.port()), again(scene.port());
  again.send(kRequest);
  EXPECT_EQ(http_status(again.read_answer()), 200);
  EXPECT_TRUE(silent.closed(60s));
  EXPECT_TRUE(again.closed(60s));
}

// Answers beyond what the system keeps for both sides: who does not read is cut off.
TEST(StatusServer, EndsAnAnswerThatNobodyReads) {
  StatusScene scene({.answer_seconds = 0.5});
  HttpClient client(scene.port(), 4096);
  std::string requests;
  for (int i = 0; i < 500; ++i) requests += "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
  client.send(requests);
  const auto metric = [&] {
    const std::string text = http_body(http_get(scene.port(), "/metrics"));
    const std::string name = "\nmoemamba_status_cut_off_total ";
    return std::stoi(text.substr(text.find(name) + name.size()));
  };
  const auto start = Clock::now();
  while (metric() == 0 && Clock::now() - start < 60s) std::this_thread::sleep_for(50ms);
  EXPECT_EQ(metric(), 1);
}

TEST(StatusServer, CutsOffTheConnectionThatWaitsLongestWhereThereAreMoreThan64) {
  StatusScene scene({.header_seconds = 600});
  std::vector<HttpClient> clients;
  for (int i = 0; i < 64; ++i) {
    clients.emplace_back(scene.port());
    clients.back().send("GET / HT");
  }
  // All of them are in, once the last one is: connections are taken in order.
  HttpClient last(scene.port());
  last.send(kRequest);
  EXPECT_EQ(http_status(last.read_answer()), 200);
  EXPECT_TRUE(clients[0].closed(60s));
  for (size_t i = 1; i < clients.size(); ++i) EXPECT_FALSE(clients[i].closed(0ms)) << i;
}

TEST(StatusServer, AnswersWhile200OthersStall) {
  StatusScene scene({.header_seconds = 600});
  std::vector<HttpClient> clients;
  for (int i = 0; i < 200; ++i) {
    clients.emplace_back(scene.port());
    clients.back().send(i % 2 ? "GET / HTTP/1.1\r\nX: a" : "");
  }
  for (int i = 0; i < 20; ++i)
    EXPECT_EQ(http_status(http_get(scene.port(), i % 2 ? "/" : "/api/status")), 200);
  int open = 0;
  for (HttpClient& client : clients) open += !client.closed(0ms);
  EXPECT_LE(open, 64);
}

TEST(StatusServer, AsksForATokenWhereThereIsOne) {
  const std::string token = "0123456789abcdef";
  StatusScene scene({.token = token});
  for (const char* target : {"/", "/healthz", "/metrics", "/api/status", "/nothing"}) {
    EXPECT_EQ(http_status(http_get(scene.port(), target)), 401) << target;
    EXPECT_EQ(http_field(http_get(scene.port(), target), "WWW-Authenticate"), "Bearer");
  }
  for (const std::string wrong : {"", "0", "0123456789abcdeg", "0123456789abcdef0"}) {
    EXPECT_EQ(http_status(http_get(scene.port(), "/healthz?token=" + wrong)), 401) << wrong;
    EXPECT_EQ(
        http_status(http_get(scene.port(), "/healthz", "Authorization: Bearer " + wrong + "\r\n")),
        401)
        << wrong;
  }
  EXPECT_EQ(http_status(http_get(scene.port(), "/healthz?token=" + token)), 200);
  EXPECT_EQ(
      http_status(http_get(scene.port(), "/healthz", "Authorization: Bearer " + token + "\r\n")),
      200);
}

// A page of another site may give itself a name that means this machine.
TEST(StatusServer, AnswersToItsOwnNamesAlone) {
  StatusScene scene;
  for (const auto& [host, status] : {std::pair{"localhost", 200},
                                     {"127.0.0.1:1", 200},
                                     {"[::1]:80", 200},
                                     {"evil.example", 421},
                                     {"127.0.0.1.evil.example", 421},
                                     {"localhost.", 421}}) {
    HttpClient client(scene.port());
    client.send(concat("GET /healthz HTTP/1.1\r\nHost: ", host, "\r\nConnection: close\r\n\r\n"));
    EXPECT_EQ(http_status(client.read_all().value_or("")), status) << host;
  }
}

TEST(StatusServer, EndsWithConnectionsOpen) {
  StatusScene scene;
  HttpClient silent(scene.port()), amid(scene.port());
  amid.send("GET / HT");
  EXPECT_EQ(http_status(http_get(scene.port(), "/healthz")), 200);
  scene.stop();
  EXPECT_TRUE(silent.closed(60s));
  EXPECT_TRUE(amid.closed(60s));
}

TEST(StatusServer, SaysWhereItCannotListen) {
  StatusScene scene;
  EXPECT_NE(message_of([&] { StatusScene({.port = scene.port()}); }).find("launch.status_port"),
            std::string::npos);
}

LaunchConfig config(const std::string& address, const std::string& token_file) {
  LaunchConfig launch;
  launch.set_status_address(address);
  launch.set_status_token_file(token_file);
  return launch;
}

std::string put_token(const TemporaryFolder& folder, const std::string& text) {
  const std::string file = folder.put("token", text);
  EXPECT_EQ(chmod(file.c_str(), 0600), 0);
  return file;
}

TEST(StatusOptions, RefuseATokenThatOthersMayRead) {
  TemporaryFolder folder;
  const std::string file = put_token(folder, "0123456789abcdef\n");
  for (const mode_t mode : {0644, 0640, 0620, 0601}) {
    ASSERT_EQ(chmod(file.c_str(), mode), 0);
    const std::string said = message_of([&] { status_options(config("127.0.0.1", file), "run"); });
    EXPECT_NE(said.find("chmod 600 " + file), std::string::npos) << said;
  }
  for (const mode_t mode : {0600, 0400}) {
    ASSERT_EQ(chmod(file.c_str(), mode), 0);
    EXPECT_EQ(status_options(config("127.0.0.1", file), "run").token, "0123456789abcdef");
  }
}

TEST(StatusOptions, WantATokenForWhatOthersCanReach) {
  TemporaryFolder folder;
  const std::string file = put_token(folder, "0123456789abcdef\n");
  for (const char* own : {"127.0.0.1", "::1"})
    EXPECT_EQ(status_options(config(own, ""), "run").token, "");
  for (const char* open : {"0.0.0.0", "::", "10.0.0.1", "127.0.0.2", "::ffff:127.0.0.1"}) {
    EXPECT_NE(message_of([&] {
                status_options(config(open, ""), "run");
              }).find("launch.status_token_file"),
              std::string::npos)
        << open;
    EXPECT_EQ(status_options(config(open, file), "run").token, "0123456789abcdef");
    EXPECT_THROW(StatusScene({.address = open}), Error) << open;
  }
  EXPECT_THROW(status_options(config("localhost", file), "run"), BadSettings);
  EXPECT_THROW(status_options(config("", file), "run"), BadSettings);
}

TEST(StatusOptions, RefuseAFileThatHoldsNoToken) {
  TemporaryFolder folder;
  EXPECT_THROW(status_options(config("127.0.0.1", folder / "none"), "run"), BadSettings);
  EXPECT_THROW(status_options(config("127.0.0.1", folder.path()), "run"), BadSettings);
  for (const std::string& wrong :
       {std::string(), std::string("\n"), std::string("short"), std::string(257, 'a'),
        std::string("0123456789abcdef\n0123456789abcdef"), std::string("0123456789 abcdef"),
        std::string("0123456789abcde&"), std::string("0123456789abcd\xc3\xa4"),
        std::string(1 << 20, 'a')}) {
    const std::string file = put_token(folder, wrong);
    EXPECT_NE(message_of([&] {
                status_options(config("127.0.0.1", file), "run");
              }).find("openssl rand -hex 16"),
              std::string::npos)
        << wrong.substr(0, 300);
  }
}

}  // namespace
}  // namespace moemamba
