#pragma once
#include <functional>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace moemamba {

using Command = std::function<int()>;    // returns the exit code
using Words = std::vector<std::string>;  // the program's arguments, without its name

// Each adds its sub-command to `app` and returns what runs it once the words are parsed.
Command add_train(CLI::App& app, const Words& words);
Command add_launch(CLI::App& app, const Words& words);
Command add_evaluate(CLI::App& app, const Words& words);
Command add_generate(CLI::App& app, const Words& words);
Command add_prepare(CLI::App& app, const Words& words);
Command add_plan(CLI::App& app, const Words& words);
Command add_settings(CLI::App& app, const Words& words);
Command add_compare(CLI::App& app, const Words& words);
Command add_inspect(CLI::App& app, const Words& words);
Command add_bench(CLI::App& app, const Words& words);
Command add_doctor(CLI::App& app, const Words& words);

}  // namespace moemamba
