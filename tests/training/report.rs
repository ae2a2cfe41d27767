//! The report of a run, made through the files that a run writes.

use std::path::Path;

use mmpo_fast::config::options::Options;
use mmpo_fast::config::{RESOLVED_FILE, resolve};
use mmpo_fast::report::{
    DataSummary, EVENTS_FOLDER, EvalMetrics, EventWriter, FACTS_FILE, History, ImplicitMetrics, METRICS_FILE,
    MetricsWriter, PairMetrics, PreferenceMetrics, RunFacts, RunReport, RunState, Sample, StepMetrics,
    WeightMetrics,
};

/// Metrics like those of a run that learns: no randomness, some wobble.
fn pairs(progress: f64, step: usize) -> PairMetrics {
    let wobble = 0.06 * ((step * 2654435761) % 97) as f64 / 97.0 - 0.03;
    let accuracy = (0.52 + 0.47 * (1.0 - (-4.0 * progress).exp()) + wobble).clamp(0.0, 1.0);
    PairMetrics {
        loss: 41.0 * (-2.2 * progress).exp() + 6.0 + 30.0 * wobble,
        logps_chosen: -60.0 * (-1.6 * progress).exp() - 9.0,
        preference: Some(PreferenceMetrics {
            rewards_chosen: -52.0 * (-2.0 * progress).exp() - 3.0 + 20.0 * wobble,
            rewards_rejected: -55.0 * (-0.9 * progress).exp() - 4.0 - 14.0 * progress,
            accuracy,
            logps_rejected: -58.0 * (-0.8 * progress).exp() - 14.0,
            likelier: 0.9 * accuracy,
        }),
        implicit: Some(ImplicitMetrics { accuracy, margin: 12.0 * progress + 4.0 * wobble }),
        weights: Some(WeightMetrics { chosen: accuracy, saturated: 0.2 + 0.6 * progress + wobble }),
    }
}

fn step(step: usize, steps: usize) -> StepMetrics {
    let progress = step as f64 / steps as f64;
    StepMetrics {
        step,
        epoch: 2.0 * progress,
        pairs: pairs(progress, step),
        grad_norm: 1.2 + 3.0 * (-5.0 * progress).exp(),
        learning_rate: 2.5e-4 * (1.0 + (std::f64::consts::PI * progress).cos()),
        tokens_per_second: 15_800.0 + 300.0 * (step as f64).sin(),
        pairs_per_second: 120.0,
        mfu: None,
        ranks: None,
        memory_peak_gib: Some(0.31),
    }
}

fn evaluation(step: usize, steps: usize) -> EvalMetrics {
    let progress = step as f64 / steps as f64;
    EvalMetrics { step, epoch: 2.0 * progress, pairs: pairs(progress, 40) }
}

/// Writes the metrics of a run to `folder` and makes its report.
fn report(folder: &Path, steps: usize) -> RunReport {
    let mut metrics = MetricsWriter::create(folder).unwrap();
    metrics.evaluation(&evaluation(0, steps)).unwrap();
    for number in 1..=steps {
        metrics.step(&step(number, steps)).unwrap();
        if number % (steps / 4).max(1) == 0 {
            metrics.evaluation(&evaluation(number, steps)).unwrap();
        }
    }
    let facts = RunFacts {
        ranks: Vec::new(),
        model: "the built-in demo".into(),
        objective: "mmpo".into(),
        device: "cpu: no CUDA driver was found; 2 threads".into(),
        total_steps: steps,
        state: RunState::Finished,
        data: vec![DataSummary {
            name: "pairs.jsonl".into(),
            read: 640,
            used: 631,
            dropped: vec![("empty response".into(), 9)],
            cut: vec![("prompts, from the left, to 48 tokens".into(), 17)],
        }],
        samples: vec![
            Sample {
                prompt: "What is the capital of France?".into(),
                before: "i dont know maybe paris or smth".into(),
                after: "The capital of France is Paris.".into(),
            },
            Sample {
                prompt: "<script>alert('x')</script> & \"quotes\" \u{1b}[0m".into(),
                before: "first line\nsecond line".into(),
                after: "a much longer answer ".repeat(12),
            },
            Sample { prompt: "Sum this up: ".repeat(40), before: "no".into(), after: "yes".into() },
        ],
        warnings: vec![
            "78 % of the pairs had a saturated weight in the last epoch: try length_normalize.".into(),
        ],
        seconds: 41.7,
    };
    facts.write(folder).unwrap();
    let recipe = resolve(Options::default(), None, false).unwrap().to_toml();
    std::fs::write(folder.join(RESOLVED_FILE), recipe).unwrap();
    RunReport::read(folder).unwrap()
}

#[test]
fn the_page_fetches_nothing_and_runs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let html = report(folder.path(), 120).to_html().unwrap();
    for outside in [
        "http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link", "<iframe", "onload",
        "onclick",
    ] {
        let place = html.find(outside).map(|at| &html[at.saturating_sub(60)..(at + 60).min(html.len())]);
        assert!(place.is_none(), "{outside} in ...{}...", place.unwrap_or_default());
    }
    assert!(html.contains("default-src 'none'"));
    assert!(html.len() < 400_000, "{} bytes", html.len());
}

#[test]
fn the_page_shows_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let html = report(folder.path(), 120).to_html().unwrap();
    for shown in [
        "<html lang=\"en\">",
        "MMPO on the built-in demo",
        "120 steps in 42 s",
        "The capital of France is Paris.",
        "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;quotes&quot;",
        "<th scope=\"row\">pairs.jsonl</th><td>640</td><td>631</td>",
        "dropped: empty response",
        "learning_rate = ",
        "saturated weight in the last epoch",
        "aria-label=\"Loss: training from ",
        "prefers-color-scheme: dark",
        // The long prompt is folded.
        "<summary class=\"prompt\">Sum this up: ",
        "<small>519 characters</small>",
    ] {
        assert!(html.contains(shown), "`{shown}` is not on the page");
    }
    assert_eq!(html.matches("<figure>").count(), 13);
    assert!(!html.contains("NaN") && !html.contains('\u{1b}'));
}

#[test]
fn every_tag_that_opens_closes() {
    let folder = tempfile::tempdir().unwrap();
    let html = report(folder.path(), 7).to_html().unwrap();
    for tag in [
        "html", "head", "body", "main", "header", "dl", "div", "table", "tr", "figure", "svg", "p", "ul",
        "article", "details", "summary",
    ] {
        let opened = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "<{tag}>");
    }
}

#[test]
fn a_run_with_nothing_to_show_still_has_a_page() {
    let html = RunReport::default().to_html().unwrap();
    assert!(
        html.contains("</html>") && !html.contains("<figure>") && !html.contains("<h2>Data</h2>"),
        "{html}"
    );
}

/// Only the page of a run that goes on loads itself again, and it alone is of a moment.
#[test]
fn a_run_that_is_not_at_its_end_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = report(folder.path(), 8);
    assert!(!run.to_html().unwrap().contains("http-equiv=\"refresh\""));
    run.facts.state = RunState::Stopped("Ctrl-C <now>".into());
    run.facts.total_steps = 20;
    let stopped = run.to_html().unwrap();
    assert!(stopped.contains("The run ended after step 8 of 20: Ctrl-C &lt;now&gt;"), "{stopped}");
    assert!(
        !stopped.contains("http-equiv=\"refresh\"") && stopped.contains("<h2>Before and after step 8</h2>")
    );
    run.facts.state = RunState::Running;
    run.refresh = Some(5);
    let live = run.to_html().unwrap();
    assert!(
        live.contains("http-equiv=\"refresh\" content=\"5\"") && live.contains("The run goes on"),
        "{live}"
    );
}

/// A run by a version without `report.json` has a page of its metrics and options.
#[test]
fn a_run_without_facts_has_its_charts() {
    let folder = tempfile::tempdir().unwrap();
    report(folder.path(), 8);
    std::fs::remove_file(folder.path().join(FACTS_FILE)).unwrap();
    let html = RunReport::read(folder.path()).unwrap().to_html().unwrap();
    assert!(html.contains("<h1>MMPO on the built-in demo</h1>") && html.contains("8 steps"), "{html}");
    assert_eq!(html.matches("<figure>").count(), 13);
    std::fs::write(folder.path().join(RESOLVED_FILE), "seed = 1\nbeta = \n").unwrap();
    let error = RunReport::read(folder.path()).unwrap_err();
    assert!(error.to_string().contains("resolved.toml:2"), "{error}");
}

/// A resumed run's event files, in a form that `tests/reference/tfevents.py read` checks with TensorBoard's own reader.
#[test]
fn event_files_of_a_resumed_run() {
    let folder = tempfile::tempdir().unwrap();
    let mut events = EventWriter::create(folder.path(), None).unwrap();
    (1..=6).for_each(|number| events.step(&step(number, 6)).unwrap());
    let mut resumed = EventWriter::create(folder.path(), Some(4)).unwrap();
    (5..=6).for_each(|number| resumed.step(&step(number, 6)).unwrap());
    resumed.evaluation(&evaluation(6, 6)).unwrap();

    let folder = folder.path().join(EVENTS_FOLDER);
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    // A version, then one event per step; after a resume a session start too.
    assert_eq!(files.iter().map(|file| records(file)).collect::<Vec<_>>(), [1 + 6, 1 + 1 + 2 + 1]);
}

/// Number of records, by their lengths alone; they must fill the file exactly.
fn records(file: &Path) -> usize {
    let bytes = std::fs::read(file).unwrap();
    let (mut at, mut count) = (0, 0);
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        at += 8 + 4 + length + 4;
        count += 1;
    }
    assert_eq!(at, bytes.len(), "{}", file.display());
    count
}

#[test]
fn an_edited_metrics_file_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(METRICS_FILE), "{\"step\":1}\nnot json\n").unwrap();
    let error = History::read(folder.path()).unwrap_err();
    assert!(error.to_string().contains("metrics.jsonl:2"), "{error}");
}
