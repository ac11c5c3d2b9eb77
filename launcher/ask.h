#pragma once
#include <string>
#include <utility>
#include <vector>

namespace moemamba {

// What a command said before it ended or its time was up.
struct Answer {
  int code = -1;         // its exit code; 128 + n after signal n; -1: it never ran, or was late
  bool missing = false;  // there is no such program in PATH
  bool late = false;     // its time was up, and it was ended
  std::string out, err;  // the first MiB of each

  bool ok() const { return code == 0; }
  // What went wrong, in one line: its first sentence on standard error that is none of mpirun's
  // frames and prefixes, else whatever it said first.
  std::string gist() const;
};

// Runs `words` (the program is looked for in PATH) in a process group of its own, with nothing to
// read, and waits at most `seconds`; then the group gets SIGTERM, two seconds later SIGKILL, and
// one that even that does not end (a dead disk) is left behind. `environment` is added to this
// process' own, without what mpirun or srun gave to this process as a rank: the command may start
// MPI of its own. Never throws; any number of threads.
Answer ask(const std::vector<std::string>& words, double seconds,
           const std::vector<std::pair<std::string, std::string>>& environment = {});

// A folder for the sessions of one mpirun, gone with this. Those that begin and end beside each
// other in one folder remove it from under each other (Open MPI 4.1).
class SessionFolder {
 public:
  SessionFolder();
  SessionFolder(const SessionFolder&) = delete;
  SessionFolder& operator=(const SessionFolder&) = delete;
  ~SessionFolder();
  // The folder; where none can be made, the one that all share.
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  bool own_ = false;
};

// Where the program is that PATH has under this name; "": nowhere.
std::string find_program(const std::string& name);

// Of this program, for starting it again.
std::string own_program();

}  // namespace moemamba
