#include "runtime/plot.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

int count(const std::string& text, const std::string& part) {
  int found = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++found;
  return found;
}

// Every opened element is closed, in order: enough of XML for what we write.
bool well_formed(const std::string& svg) {
  std::vector<std::string> open;
  for (size_t at = 0; (at = svg.find('<', at)) != std::string::npos;) {
    const size_t end = svg.find('>', at);
    if (end == std::string::npos) return false;
    const std::string tag = svg.substr(at + 1, end - at - 1);
    if (tag[0] == '/') {
      if (open.empty() || open.back() != tag.substr(1)) return false;
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(tag.substr(0, tag.find(' ')));
    }
    at = end;
  }
  return open.empty();
}

TEST(Plot, IsWellFormedWhateverTheData) {
  const double nan = std::nan("");
  const std::vector<std::vector<double>> curves = {
      {},      {1}, {nan}, {2, 2, 2}, {1, nan, HUGE_VAL, 3}, {1e300, -1e300}, {1e-300, 2e-300},
      {0, 1e9}};
  for (const auto& y : curves) {
    std::vector<double> x;
    for (size_t i = 0; i < y.size(); ++i) x.push_back(double(i));
    for (const bool points : {false, true}) {
      const std::string svg =
          to_svg({.title = "a < b & \"c\"",
                  .x_label = "x",
                  .y_label = "y",
                  .series = {{.label = "<one>", .x = x, .y = y, .points = points}}});
      EXPECT_TRUE(well_formed(svg)) << svg;
      EXPECT_EQ(svg.find("nan"), std::string::npos) << svg;
      EXPECT_EQ(svg.find("inf"), std::string::npos) << svg;
      EXPECT_LT(svg.size(), 20000u);
    }
  }
}

TEST(Plot, LabelsItsAxesAndFollowsTheReadersGround) {
  const std::string svg =
      to_svg({.title = "Loss",
              .x_label = "step",
              .y_label = "nats",
              .series = {{.label = "training", .x = {0, 50, 100}, .y = {8, 4, 3.5}}}});
  for (const char* word :
       {">Loss<", ">step<", ">nats<", ">training<", ">100<", ">4<", "prefers-color-scheme:dark"})
    EXPECT_NE(svg.find(word), std::string::npos) << word;
}

TEST(Plot, BreaksCurvesWhereNothingIsKnown) {
  const std::string svg =
      to_svg({.series = {{.x = {0, 1, 2, 3, 4}, .y = {1, 2, std::nan(""), 3, 4}}}});
  const size_t begin = svg.find(" d=\"");
  EXPECT_EQ(count(svg.substr(begin, svg.find('"', begin + 4) - begin), "M"), 2);
}

TEST(Plot, SmoothsToTheMean) {
  const auto means = smoothed({4, 4, 4, std::nan(""), 4}, 3);
  for (const double mean : means) EXPECT_DOUBLE_EQ(mean, 4);
  EXPECT_NEAR(smoothed({0, 1}, 1)[1], 2.0 / 3, 1e-12);  // weights 1/2 and 1
}

TEST(Plot, DrawsARunsMetrics) {
  TemporaryFolder folder;
  PosixFileSystem files;
  folder.put("metrics.jsonl",
             "{\"step\":1,\"ce\":8.0}\n{\"step\":2,\"ce\":null}\n"
             "{\"step\":3,\"ce\":6.0,\"val_loss\":6.5}\nnot json\n{\"step\":4,\"ce\":5.0}\n"
             "{\"step\":5,\"ce\":4.");  // killed while writing
  const Plot plot = loss_plot(folder / "metrics.jsonl");
  ASSERT_EQ(plot.series.size(), 3u);
  EXPECT_EQ(plot.series[0].x, (std::vector<double>{1, 2, 3, 4}));
  EXPECT_EQ(plot.series[1].y, (std::vector<double>{6.5}));
  write_loss_svg(files, folder.path());
  const std::string svg = read_file(folder / "loss.svg");
  EXPECT_TRUE(well_formed(svg));
  EXPECT_EQ(count(svg, "<circle"), 1);
}

}  // namespace
}  // namespace moemamba
