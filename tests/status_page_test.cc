// The page in a real browser.
#include <gtest/gtest.h>

#include <fstream>
#include <optional>

#include "core/file.h"
#include "tests/support/chromium.h"
#include "tests/support/http_client.h"
#include "tests/support/status_scene.h"

namespace moemamba {
namespace {

class StatusPageTest : public testing::Test {
 protected:
  void SetUp() override {
    if (Chromium::program().empty()) GTEST_SKIP() << "no chromium (apt-get install chromium)";
    browser_.emplace();
  }
  Chromium& browser() { return *browser_; }

  // A scene with files, shown.
  void show(StatusScene& scene, const Chromium::Look& look = {}) {
    write(scene);
    browser().open(scene.url(), look);
    ASSERT_TRUE(browser().becomes(kReady)) << complaints();
    ASSERT_TRUE(browser().becomes("document.querySelectorAll('#samples article').length > 0"));
    ASSERT_TRUE(browser().becomes("curves.data.step.length === 340"));
  }
  static void write(StatusScene& scene) {
    scene.folder().put("samples.jsonl", scene_samples());
    scene.folder().put("metrics.jsonl", scene_metrics(340));
  }
  std::string text(const std::string& selector) {
    const auto found = browser().value("document.querySelector(" + nlohmann::json(selector).dump() +
                                       ")?.textContent ?? 'nothing of this name'");
    return found.get<std::string>();
  }
  std::string complaints() {
    std::string all;
    for (const std::string& complaint : browser().complaints()) all += complaint + "\n";
    return all;
  }
  // Neither console nor policy has anything to say, and all that was asked for is of the server.
  void expect_quiet(const std::string& url) {
    EXPECT_EQ(complaints(), "");
    EXPECT_GE(browser().requests().size(), 4u);
    for (const std::string& request : browser().requests())
      EXPECT_TRUE(request.starts_with(url) || request.starts_with("data:")) << request;
  }
  static constexpr const char* kReady = "document.documentElement?.dataset.ready === 'true'";

 private:
  std::optional<Chromium> browser_;
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_F(StatusPageTest, ShowsTheRun) {
  StatusScene scene;
  show(scene);
  EXPECT_EQ(text("#run"), "quickstart");
  EXPECT_EQ(text("#state"), "training");
  EXPECT_TRUE(contains(text("#sentence"), "step 340 of 660, 51.5 %, about 1 min 1"))
      << text("#sentence");
  EXPECT_EQ(browser().value("document.title"), "51 % training · quickstart");
  EXPECT_EQ(browser().value("$('bar').getAttribute('aria-valuenow')"), "51.5");
  const std::string tiles = text("#tiles");
  for (const char* part : {"Loss", "Held-out loss", "bits per byte", "Tokens per second", "36.",
                           "k", "All-to-all12.5 %", "Ranks4 of 4", "Checkpointstep 330",
                           "10 steps behind", "Restarts1", "9 steps twice, 1 skipped"})
    EXPECT_TRUE(contains(tiles, part)) << part << " in " << tiles;
  EXPECT_EQ(browser().value("$('alarm').hidden"), true);
  EXPECT_EQ(text("#events li b"), "saved");  // the newest one
  EXPECT_EQ(browser().value("document.querySelectorAll('#events li').length"), 8);
  EXPECT_TRUE(contains(text("#events"), "rank 2 on node2 (process 3987) was killed by signal 9"));
  EXPECT_TRUE(contains(text("#hosts"), "node1 ranks 0, 1 · 833 MiB")) << text("#hosts");
  EXPECT_TRUE(contains(text("#samples article"), "after step 330Sir Walter Elliot"));
  expect_quiet(scene.url());
}

TEST_F(StatusPageTest, DrawsCurves) {
  StatusScene scene;
  show(scene);
  EXPECT_EQ(browser().value("document.querySelectorAll('#charts figure').length"), 5);
  EXPECT_EQ(
      browser().value("[...document.querySelectorAll('#charts svg')].filter((svg) => "
                      "svg.querySelector('path.line').getAttribute('d').length > 1000).length"),
      5);
  EXPECT_EQ(browser().value("document.querySelectorAll('#charts circle.dot.b').length"), 6);
  // The gap of the step that was not finite, and lines that stay inside of the picture.
  EXPECT_EQ(browser().value("document.querySelector('#charts path.raw').getAttribute('d')"
                            ".split('M').length"),
            3);
  EXPECT_EQ(browser().value("[...document.querySelectorAll('#charts svg')].every((svg) => "
                            "[...svg.querySelectorAll('path')].every((path) => { const b = "
                            "path.getBBox(); return b.x >= 0 && b.y >= 0 && b.x + b.width <= "
                            "svg.clientWidth && b.y + b.height <= svg.clientHeight; }))"),
            true);
  // Linear at first; logarithmic where the button was pressed.
  const std::string line = "document.querySelector('#charts path.line').getAttribute('d')";
  const auto linear = browser().value(line);
  browser().value("document.querySelector('#charts button').click()");
  EXPECT_NE(browser().value(line), linear);
  EXPECT_EQ(browser().value("document.querySelector('#charts button').ariaPressed"), "true");
  expect_quiet(scene.url());
}

TEST_F(StatusPageTest, ReadsCurvesOutWhereOnePointsAndUnderArrowKeys) {
  StatusScene scene;
  show(scene);
  EXPECT_TRUE(contains(text("#charts output"), "training 3")) << text("#charts output");
  const auto box = browser().value(
      "(() => { const b = document.querySelector('#charts svg').getBoundingClientRect(); return "
      "[b.x, b.y, b.width, b.height]; })()");
  browser().point_at(box[0].get<double>() + 46, box[1].get<double>() + 50);
  EXPECT_TRUE(contains(text("#charts output"), "step 1")) << text("#charts output");
  EXPECT_EQ(browser().value("document.querySelectorAll('#charts .cursor').length"), 5);
  browser().point_at(5, 5);
  EXPECT_EQ(browser().value("document.querySelectorAll('#charts .cursor').length"), 0);
  browser().value("document.querySelector('#charts svg').focus()");
  browser().press("ArrowLeft");
  browser().press("ArrowLeft");
  EXPECT_TRUE(contains(text("#charts output"), "step 338")) << text("#charts output");
  EXPECT_TRUE(contains(browser().value("document.querySelector('#charts svg').ariaLabel"),
                       "Loss; step 338: training "));
  browser().press("Escape");
  EXPECT_FALSE(contains(text("#charts output"), "step"));
}

TEST_F(StatusPageTest, ColoursOverloadedExpertsRedAndDeadOnesGrey) {
  StatusScene scene;
  show(scene);
  EXPECT_TRUE(contains(text("#experts-text"),
                       "Most loaded: layer 2, expert 5, 2.73 times the even share. Dead: 1"))
      << text("#experts-text");
  const auto pixel = [&](int layer, int expert) {
    return browser().value("[...$('heat').getContext('2d').getImageData(heat.left + heat.wide * " +
                           std::to_string(expert) + " + 3, heat.tall * " + std::to_string(layer) +
                           " + 3, 1, 1).data]");
  };
  const auto hot = pixel(2, 5), dead = pixel(4, 1);
  EXPECT_GT(hot[0], 190);
  EXPECT_LT(hot[1], 80);
  EXPECT_LT(hot[2], 80);
  EXPECT_EQ(dead, nlohmann::json({0x8b, 0x92, 0x9b, 255}));
  browser().value("$('heat').focus()");
  for (const char* key :
       {"ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"})
    browser().press(key);
  EXPECT_EQ(text("#cell"), "layer 4, expert 1: 0 choices, dead");
}

TEST_F(StatusPageTest, ShowsRanksAndWhoIsSlow) {
  StatusScene scene;
  show(scene);
  EXPECT_EQ(browser().value("document.querySelectorAll('#ranks tr').length"), 4);
  EXPECT_TRUE(contains(text("#ranks tr:nth-child(2)"), "in expert, 3.58k of 4.1k rows"))
      << text("#ranks tr:nth-child(2)");
  EXPECT_TRUE(contains(text("#ranks tr:nth-child(3)"), "step 341, backward, layer 2"));
  EXPECT_TRUE(contains(text("#ranks tr:nth-child(4)"), "slow"));
  EXPECT_TRUE(contains(text("#ranks tr:nth-child(4)"), "439 MiB"));
  scene.change([](RunView& view) {
    view.of_ranks[2].state = RankState::silent;
    view.of_ranks[2].progressed -= 60;
  });
  EXPECT_TRUE(browser().becomes(
      "document.querySelector('#ranks tr:nth-child(3)').textContent.includes('silent')"));
  EXPECT_TRUE(contains(text("#ranks tr:nth-child(3)"), "no progress for 1 min"));
  EXPECT_TRUE(contains(text("#tiles"), "Ranks3 of 4"));
}

TEST_F(StatusPageTest, FitsNarrowAndWideScreensLightAndDark) {
  StatusScene scene;
  write(scene);
  for (const int width : {320, 400, 800, 1600, 2560})
    for (const bool dark : {false, true}) {
      browser().open(scene.url(), {.width = width, .height = 900, .dark = dark});
      ASSERT_TRUE(browser().becomes(kReady)) << complaints();
      EXPECT_LE(browser().value("document.documentElement.scrollWidth"), width);
      // Nothing sticks out of what holds it, but in the table's own scroller.
      EXPECT_EQ(
          browser().value("[...document.querySelectorAll('body *')].filter((e) => "
                          "!e.closest('.scrolls, svg, pre') && e.getBoundingClientRect().right "
                          "> innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 99))"),
          nlohmann::json::array())
          << width;
      const auto ground = browser().value("getComputedStyle(document.body).backgroundColor");
      EXPECT_EQ(ground, dark ? "rgb(14, 17, 22)" : "rgb(246, 247, 249)");
    }
}

// WCAG's contrast of 4.5 to 1 for every text that is shown.
TEST_F(StatusPageTest, HasTextThatCanBeRead) {
  StatusScene scene;
  for (const bool dark : {false, true}) {
    show(scene, {.dark = dark});
    const auto faint = browser().value(R"((() => {
      const rgb = (text) => text.match(/[\d.]+/g).map(Number);
      const part = (x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
      const light = ([r, g, b]) =>
          0.2126 * part(r / 255) + 0.7152 * part(g / 255) + 0.0722 * part(b / 255);
      const ground = (e) => {
        for (; e; e = e.parentElement) {
          const color = rgb(getComputedStyle(e).backgroundColor);
          if (color.length < 4 || color[3] === 1) return color;
        }
        return [255, 255, 255];
      };
      const contrast = (e) => {
        const style = getComputedStyle(e);
        const a = light(rgb(e.closest('svg') ? style.fill : style.color)), b = light(ground(e));
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      };
      const own_text = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      return [...document.querySelectorAll('body *')]
          .filter((e) => own_text(e) && e.checkVisibility() && !e.closest('script, style'))
          .filter((e) => contrast(e) < 4.5)
          .map((e) => [contrast(e), e.outerHTML.slice(0, 80)]);
    })())");
    EXPECT_EQ(faint, nlohmann::json::array()) << (dark ? "dark" : "light");
  }
}

TEST_F(StatusPageTest, TakesNoTextForMarkup) {
  StatusScene scene;
  scene.change(make_weird);
  write(scene);
  browser().open(scene.url());
  ASSERT_TRUE(browser().becomes(kReady)) << complaints();
  ASSERT_TRUE(browser().becomes("document.querySelectorAll('#samples article').length > 0"));
  EXPECT_EQ(browser().value("document.querySelectorAll('img, iframe, object').length"), 0);
  EXPECT_EQ(browser().value("document.querySelectorAll('script').length"), 1);
  EXPECT_TRUE(contains(text("#events li"), "</script><img src=x onerror=alert(1)>"));
  EXPECT_TRUE(contains(text("#hosts"), "</script><img"));
  EXPECT_TRUE(contains(text("#report"), "</script><img"));
  EXPECT_TRUE(contains(text("#samples article"), "not <b>think</b> of it"));
  EXPECT_LE(browser().value("document.documentElement.scrollWidth"), 1600);
  expect_quiet(scene.url());
}

TEST_F(StatusPageTest, SaysWhatIsWrong) {
  StatusScene scene;
  show(scene);
  scene.change([](RunView& view) {
    view.of_ranks[3].state = RankState::hanging;
    view.hang_report = "rank 3 on node2: forward, layer 3, collective 51237 of expert";
  });
  EXPECT_TRUE(browser().becomes("document.documentElement.dataset.state === 'hanging'"));
  EXPECT_EQ(text("#alarm"),
            "The run hangs. hanging: rank 3 makes no progress in step 341, phase forward");
  EXPECT_EQ(browser().value("$('trouble').open && !$('trouble').hidden"), true);
  EXPECT_TRUE(contains(text("#report"), "collective 51237"));
  scene.change([](RunView& view) {
    view.state = RunState::failed;
    view.state_text = "three failures at step 341, see the report";
  });
  EXPECT_TRUE(browser().becomes("document.documentElement.dataset.state === 'failed'"));
  EXPECT_EQ(text("#alarm"), "The run has failed: three failures at step 341, see the report");
  EXPECT_EQ(text("#state"), "failed");
  EXPECT_EQ(browser().value("$('state').className"), "pill bad");
  // What is over stays at hand, and out of the way.
  scene.change([](RunView& view) {
    view.state = RunState::training;
    view.of_ranks[3].state = RankState::alive;
  });
  EXPECT_TRUE(browser().becomes("document.documentElement.dataset.state === 'training'"));
  EXPECT_EQ(browser().value("$('alarm').hidden && !$('trouble').hidden && !$('trouble').open"),
            true);
}

TEST_F(StatusPageTest, TakesTheEndOfARunForNoTrouble) {
  StatusScene scene;
  scene.change([](RunView& view) {
    view.state = RunState::done;
    view.state_text = "660 steps are done";
    for (RankView& rank : view.of_ranks) rank.state = RankState::ended;
    view.of_ranks[0].step = 659;
  });
  show(scene);
  EXPECT_EQ(text("#sentence"), "step 660 of 660, 100 % · 660 steps are done");
  EXPECT_EQ(browser().value("$('state').className"), "pill good");
  EXPECT_EQ(browser().value("document.querySelectorAll('#ranks .bad, #tiles .bad').length"), 0);
  scene.stop();
  EXPECT_TRUE(browser().becomes("document.documentElement.dataset.state === 'silent'"));
  EXPECT_TRUE(contains(text("#alarm"), "It ended with its run, which was done")) << text("#alarm");
}

TEST_F(StatusPageTest, SaysWhenTheSupervisorIsGoneAndWhenItIsBack) {
  StatusScene scene;
  show(scene);
  scene.stop();
  EXPECT_TRUE(browser().becomes("document.documentElement.dataset.state === 'silent'"));
  EXPECT_TRUE(contains(text("#alarm"), "The supervisor does not answer since "));
  EXPECT_TRUE(contains(text("#alarm"), "the same command starts it again"));
  EXPECT_TRUE(contains(text("#sentence"), "step 340 of 660"));  // the last that is known
  EXPECT_EQ(browser().value("document.documentElement.className"), "stale");
  StatusScene again({.port = scene.port()});
  again.change([](RunView& view) { view.of_ranks[0].step = 350; });
  EXPECT_TRUE(browser().becomes("document.documentElement.dataset.state === 'training'"));
  EXPECT_EQ(browser().value("$('alarm').hidden"), true);
  EXPECT_TRUE(contains(text("#sentence"), "step 351 of 660"));
}

TEST_F(StatusPageTest, FollowsTheRunByItself) {
  StatusScene scene;
  show(scene);
  scene.folder().put("metrics.jsonl", scene_metrics(345));
  scene.change([](RunView& view) {
    view.of_ranks[0].step = 344;
    view.events.push_back({1764072300, "saved", 345, "checkpoints/step-00000345"});
  });
  EXPECT_TRUE(browser().becomes("curves.data.step.length === 345"));
  EXPECT_TRUE(contains(text("#sentence"), "step 345 of 660"));
  EXPECT_TRUE(contains(text("#events li"), "step-00000345"));
  // New steps are asked for alone; and all, once the file is another one.
  EXPECT_TRUE(browser().requests().end() != std::find(browser().requests().begin(),
                                                      browser().requests().end(),
                                                      scene.url() + "api/curves?from=340"));
  scene.folder().put("next", scene_metrics(330));
  std::filesystem::rename(scene.folder() / "next", scene.folder() / "metrics.jsonl");
  EXPECT_TRUE(browser().becomes("curves.data.step.length === 330"));
  browser().value("document.querySelector('#ranges button:last-child').click()");
  EXPECT_TRUE(browser().becomes("curves.data.step.length === 100"));
  EXPECT_EQ(browser().value("curves.data.step[0]"), 230);
}

TEST_F(StatusPageTest, ShowsALargeRun) {
  RunView view = scene_view();
  const RankView rank = view.of_ranks[0];
  view.ranks = 1024;
  view.of_ranks.assign(1024, rank);
  for (int r = 0; r < 1024; ++r) {
    view.of_ranks[size_t(r)].rank = r;
    view.of_ranks[size_t(r)].host = concat("node", r / 8);
  }
  view.of_ranks[777].straggler = true;
  view.steps = 200000;
  view.experts = {.step = 1, .layers = 32, .experts = 256, .choices = {}};
  view.experts.choices.assign(8192, 3);
  StatusScene scene({}, view);
  scene.folder().put("metrics.jsonl", scene_metrics(100000));
  for (const int width : {400, 1600}) {
    browser().open(scene.url(), {.width = width});
    ASSERT_TRUE(browser().becomes(kReady)) << complaints();
    ASSERT_TRUE(browser().becomes("curves.data.step.at(-1) === 99999"));
    EXPECT_LE(browser().value("curves.data.step.length"), 3000);
    EXPECT_EQ(browser().value("document.querySelectorAll('#charts path.band').length > 1"), true);
    EXPECT_LE(browser().value("document.documentElement.scrollWidth"), width);
    EXPECT_EQ(browser().value("document.querySelectorAll('#ranks tr').length"), 64);
    EXPECT_EQ(text("#ranks tr th"), "777");
    browser().value("$('all-ranks').click()");
    EXPECT_EQ(browser().value("document.querySelectorAll('#ranks tr').length"), 1024);
  }
  expect_quiet(scene.url());
}

TEST_F(StatusPageTest, ShowsARunOfWhichNothingIsKnown) {
  StatusScene scene({}, RunView());
  for (const int width : {400, 1600}) {
    browser().open(scene.url(), {.width = width});
    ASSERT_TRUE(browser().becomes(kReady)) << complaints();
    EXPECT_EQ(text("#state"), "starting");
    EXPECT_TRUE(contains(text("#events"), "none yet"));
    EXPECT_TRUE(contains(text("#charts svg"), "nothing yet"));
    EXPECT_EQ(browser().value("$('experts').hidden && $('samples-section').hidden"), true);
    EXPECT_LE(browser().value("document.documentElement.scrollWidth"), width);
  }
  EXPECT_EQ(complaints(), "");
}

TEST_F(StatusPageTest, HandsItsTokenOn) {
  TemporaryFolder folder;  // before the browser's page asks for it
  StatusScene scene({.run = folder.path(), .token = "0123456789abcdef"});
  browser().open(scene.url() + "?token=0123456789abcdef");
  ASSERT_TRUE(browser().becomes(kReady)) << complaints();
  EXPECT_EQ(complaints(), "");
  for (const std::string& request : browser().requests())
    EXPECT_EQ(contains(request, "token="), !contains(request, "/api/")) << request;
}

// The pictures of docs/, left in the build's folder (docs/testing.md).
TEST_F(StatusPageTest, LooksAsInTheReadme) {
  StatusScene scene;
  for (const auto& [name, look] : {std::pair{"status_page.png", Chromium::Look{.width = 1600}},
                                   {"status_page_400.png", {.width = 400, .dark = true}}}) {
    show(scene, look);
    const std::string picture = browser().png();
    EXPECT_EQ(picture.substr(1, 3), "PNG");
    EXPECT_GT(picture.size(), 20000u);
    std::ofstream(join_path(MOEMAMBA_BINARY_DIR, name), std::ios::binary) << picture;
  }
}

}  // namespace
}  // namespace moemamba
