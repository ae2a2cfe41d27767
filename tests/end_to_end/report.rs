//! `report`, `train --live`, and the reports of runs that do not come to their end.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{CommandLine, TRAIN, Workplace};

const CONFIG: i32 = 2;
const NUMERICS: i32 = 7;
const EVALUATED: &str = "--max-steps 4 --eval-data pairs.jsonl --eval-steps 2";

impl Workplace {
    fn page(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }
}

/// Nothing on the page makes a browser ask for anything, or run anything.
#[track_caller]
fn assert_fetches_nothing(page: &str) {
    for outside in [
        "http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link", "<iframe", " onload",
        " onclick",
    ] {
        assert!(!page.contains(outside), "{outside} in {page}");
    }
    assert!(page.contains("Content-Security-Policy\" content=\"default-src 'none'"), "{page}");
}

#[test]
fn a_report_is_written_again_from_what_the_folder_holds() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} {EVALUATED} --output run"));
    let first = work.page("run/report.html");
    assert_fetches_nothing(&first);
    assert!(first.contains("<h2>Answers before and after</h2>") && !first.contains("http-equiv=\"refresh\""));
    assert!(first.contains("pairs.jsonl, to evaluate on</th>"), "the same file twice: {first}");
    std::fs::remove_file(work.path("run/report.html")).unwrap();
    let finished = work.succeed("report run");
    assert_eq!(finished.stdout, "report  run/report.html\n");
    assert_eq!(work.page("run/report.html"), first);
    assert_eq!(work.succeed("report run --output elsewhere.html").stdout, "report  elsewhere.html\n");
    assert_eq!(work.page("elsewhere.html"), first);

    // As a process that was killed leaves it: a line cut short, no model and no end.
    let facts = work.page("run/report.json").replace("\"state\": \"finished\"", "\"state\": \"running\"");
    assert!(facts.contains("\"running\""), "{facts}");
    work.write("run/report.json", facts);
    work.write("run/metrics.jsonl", [work.page("run/metrics.jsonl").as_str(), "{\"step\": 5, \"lo"].concat());
    let killed = work.succeed("report run");
    assert!(killed.stderr.contains("the last line was cut short"), "{}", killed.stderr);
    let page = work.page("run/report.html");
    assert!(page.contains("The run ended after step 4 of 4: its process ended before"), "{page}");
}

#[test]
fn runs_are_compared_on_one_page() {
    let work = Workplace::new();
    let dpo = format!("{TRAIN} --objective dpo {EVALUATED}");
    work.succeed(&format!("{dpo} --output runs/slow"));
    let fast = CommandLine::new(&dpo).set("--learning-rate", "5e-3");
    work.succeed(&format!("{fast} --output runs/<fast>"));
    assert_eq!(work.succeed("report runs/slow runs/<fast>").stdout, "report  comparison.html\n");
    let page = work.page("comparison.html");
    assert_fetches_nothing(&page);
    for part in [
        "<h1>2 runs beside each other</h1>",
        "<tr><th scope=\"row\">learning_rate</th><td class=\"text\">0.001</td><td class=\"text\">0.005</td></tr>",
        "<li class=\"line-1 stroke\">&lt;fast&gt;</li>",
        " best</td>",
        "<th scope=\"row\">evaluation loss</th>",
    ] {
        assert!(page.contains(part), "no {part} in {page}");
    }
    assert!(!page.contains("<th scope=\"row\">output</th>") && !page.contains("<th scope=\"row\">seed</th>"));
    assert!(!page.contains("<th scope=\"col\"></th>"), "a column with nothing in it");
    // Another objective: its loss is not compared.
    work.succeed(&format!("{dpo} --beta 0.5 --output runs/beta"));
    work.succeed("report runs/slow runs/beta --output pages.html");
    assert!(work.page("pages.html").contains("different objectives or objective options"));
}

#[test]
fn what_is_no_run_or_no_page_is_refused() {
    let work = Workplace::new();
    work.refuse("report base", CONFIG, &["base holds no run", "the --output of `mmpo-fast train`"]);
    work.refuse("report absent", CONFIG, &["absent holds no run"]);
    work.refuse("report pairs.jsonl", 5, &["pairs.jsonl/metrics.jsonl", "a part of the path is a file"]);
    work.refuse("report base --output pairs.jsonl", CONFIG, &["does not end in .html"]);
    std::fs::create_dir(work.path("folder.html")).unwrap();
    work.refuse("report base --output folder.html", CONFIG, &["folder.html is a folder, not a file"]);
    work.refuse(&format!("report {}", "base ".repeat(17)), CONFIG, &["17 runs are too many"]);
    work.succeed(&format!("{TRAIN} --max-steps 1 --output run"));
    work.write("run/report.json", "{\"seconds\": \"long\"}");
    work.refuse("report run", 3, &["run/report.json:1: not the facts of a run"]);
    work.write("recipe.toml", "live = true\n");
    work.refuse("train --recipe recipe.toml", CONFIG, &["`live` is a flag, not a recipe key"]);
}

#[test]
fn a_run_that_fails_has_a_report_of_its_steps() {
    let work = Workplace::new();
    let run =
        CommandLine::new(&format!("{TRAIN} --warmup-steps 0 --max-steps 5")).set("--learning-rate", "1e5");
    work.refuse(&format!("{run} --output run"), NUMERICS, &["not a number to train on"]);
    let page = work.page("run/report.html");
    assert!(
        page.contains("The run ended after step 1 of 5: ") && page.contains("not a number to train on"),
        "{page}"
    );
    // It began, and has no checkpoint: it begins again.
    work.refuse(&format!("{run} --output run --resume"), NUMERICS, &["not a number to train on"]);
}

/// While it goes on, the page loads itself again; after Ctrl-C it says where the run stopped, and at the end neither.
#[test]
fn a_live_page_follows_the_run() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 4000 --output run");
    let mut command = work.command(&format!("{run} --live"));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !work.path("run/report.html").exists() {
        assert!(started.elapsed() < Duration::from_secs(300), "no live page");
        assert_eq!(child.try_wait().unwrap(), None, "the run ended");
        std::thread::sleep(Duration::from_millis(50));
    }
    let page = work.page("run/report.html");
    assert!(
        page.contains("http-equiv=\"refresh\" content=\"5\"") && page.contains("The run goes on"),
        "{page}"
    );
    assert_fetches_nothing(&page);
    // Another process reads the run without disturbing it.
    work.succeed("report run --output now.html");
    assert!(work.page("now.html").contains("The run was going on when this page was written"));
    let signalled =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(signalled.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let page = work.page("run/report.html");
    assert!(page.contains(" of 4000: stopped by Ctrl-C") && page.contains("--resume"), "{page}");
    assert!(!page.contains("http-equiv=\"refresh\""));
}
