#include <sys/stat.h>

#include <boost/asio/ip/address.hpp>
#include <cstdio>

#include "core/file.h"
#include "core/schema.h"
#include "launcher/supervisor/status_server.h"

namespace moemamba {

namespace {

constexpr size_t kFewestTokenBytes = 16, kMostTokenBytes = 256;

// As the run's secret: who can read it can read the run.
void check_is_private(const std::string& path) {
  struct stat facts {};
  if (stat(path.c_str(), &facts) != 0 || (facts.st_mode & 077) == 0) return;
  char mode[8];
  std::snprintf(mode, sizeof mode, "%04o", unsigned(facts.st_mode & 07777));
  throw BadSettings(concat("launch.status_token_file: ", path, ": has mode ", mode,
                           ", so that others may read the token; expected 0600: make a new one ",
                           "and chmod 600 ", path));
}

// What the file holds. What it may consist of needs no escapes in an address.
std::string token_of(const std::string& path) {
  std::string token;
  try {
    token = MappedFile(path).text().substr(0, kMostTokenBytes + 2);
  } catch (const Error& error) {
    throw BadSettings(concat("launch.status_token_file: ", error.what()));
  }
  check_is_private(path);
  while (!token.empty() && (token.back() == '\n' || token.back() == '\r')) token.pop_back();
  const bool fits = token.find_first_not_of(
                        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~") ==
                    std::string::npos;
  if (fits && token.size() >= kFewestTokenBytes && token.size() <= kMostTokenBytes) return token;
  throw BadSettings(concat("launch.status_token_file: ", path, ": expected one line of ",
                           kFewestTokenBytes, " to ", kMostTokenBytes,
                           " letters, digits, \"-\", \".\", \"_\" and \"~\"; make one with: ",
                           "openssl rand -hex 16 > ", path));
}

}  // namespace

StatusOptions status_options(const LaunchConfig& launch, const std::string& run) {
  StatusOptions options{
      .run = run, .address = launch.status_address(), .port = launch.status_port()};
  boost::system::error_code error;
  boost::asio::ip::make_address(options.address, error);
  if (error)
    throw BadSettings(concat("launch.status_address=", options.address,
                             ": expected a numeric address of this machine, such as 127.0.0.1, or "
                             "0.0.0.0 for all of them"));
  if (!launch.status_token_file().empty()) options.token = token_of(launch.status_token_file());
  const bool alone = options.address == "127.0.0.1" || options.address == "::1";
  if (!alone && options.token.empty())
    throw BadSettings(concat("launch.status_address=", options.address,
                             ": others can reach it, so that requests need a token: set "
                             "launch.status_token_file to a file with one line, made with: openssl "
                             "rand -hex 16"));
  return options;
}

}  // namespace moemamba
