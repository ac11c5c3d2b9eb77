#pragma once
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace moemamba {

// Start the same command again, it goes on: a rank was lost, or the run was asked to end early.
constexpr int kExitRestart = 75;
constexpr int kExitSettings = 2;  // settings or usage; nothing was begun

// --ranks
void add_ranks_option(CLI::App& app, int& ranks);

// This process' rank if mpirun (or srun) has started it; -1 otherwise. Known before MPI starts.
int started_rank();
int started_local_rank();  // among the ranks of this machine; 0 where nobody says
int started_ranks();  // how many; 1 without mpirun

// True: `ranks` processes are wanted and this is none of them yet: launch() is due.
bool must_launch(int ranks);

// What the first SIGINT, SIGTERM or SIGUSR1 does to the ranks.
enum class OnSignal {
  end,  // ends them
  ask,  // reaches them as SIGUSR1, which mpirun hands on (StopSignals); the second one ends them
};

// Runs this program with `words` under mpirun, with what this machine needs:
// root, more ranks than cores, no binding, one BLAS thread, copies that containers allow. Waits;
// if this process dies, so do the ranks. Returns mpirun's exit code, which is that of the first
// rank that failed, but 128 + n after signal n (SIGUSR1 asks for no more than it gets: 0), and
// kExitRestart if a rank was killed.
int launch(int ranks, const std::vector<std::string>& words, OnSignal on_signal);

// Another way than launch() to have ranks: the words of a command that starts them.
struct RanksCommand {
  int ranks = 1;
  std::string hostfile;                     // empty: this machine
  std::vector<std::string> options;         // further words of mpirun or srun
  std::vector<std::string> names;           // environment variables that all ranks get as well
  std::vector<std::string> words;           // of this program
  std::vector<std::string> hosts_left_out;  // of a Slurm allocation
  int hosts = 0;                            // of it; 0: all
};
// Both put into this process's environment what the ranks inherit.
std::vector<std::string> mpirun_words(const RanksCommand& command);
std::vector<std::string> srun_words(const RanksCommand& command, const std::string& mpi);

// Where progress goes.
struct Terminal {
  bool present = false;
  bool color = false;
  int columns = 0;
};
// Of standard error; ranks below launch() are told by it what it writes to.
Terminal find_terminal();

}  // namespace moemamba
