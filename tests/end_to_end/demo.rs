//! `mmpo-fast train` with no arguments.

use mmpo_fast::checkpoint::ModelFolder;

use crate::harness::Workplace;

#[test]
fn the_demo_learns_its_preference_and_shows_it() {
    let work = Workplace::new();
    let finished = work.succeed("train");
    let run = "mmpo-fast-demo";

    let parameters: usize = ModelFolder::open(&work.path("mmpo-fast-demo/model"))
        .unwrap()
        .config()
        .tensors()
        .iter()
        .map(|spec| spec.values())
        .sum();
    assert!(parameters <= 2_000_000, "{parameters} parameters");
    let pairs = finished.stderr.lines().find(|line| line.contains("the built-in demo: ")).unwrap();
    let pairs = pairs.split(' ').zip(pairs.split(' ').skip(1)).find(|(_, word)| *word == "pairs,");
    let pairs: usize = pairs.unwrap().0.parse().unwrap();
    assert!(pairs >= 600, "{pairs} pairs");

    // Held-out pairs: few prefer the chosen response before, all of them after.
    let likelier = work.series(run, "eval_logps/accuracies");
    assert!(likelier[0] <= 0.5, "{likelier:?}");
    assert_eq!(likelier.last(), Some(&1.0), "{likelier:?}");
    let margins = work.series(run, "eval_logps/margins");
    assert!(margins[0] < 0.0 && margins[margins.len() - 1] > 1.0, "{margins:?}");

    for row in [
        "chosen gained more",
        "gain of chosen over rejected",
        "chosen is the likelier",
        "log-prob margin",
        "reward accuracy",
        "reward margin",
        "loss",
    ] {
        assert!(finished.stdout.contains(row), "no row {row:?} in: {}", finished.stdout);
    }
    let answers = |label: &str| -> Vec<&str> {
        finished.stdout.lines().filter_map(|line| line.strip_prefix(label)).map(str::trim).collect()
    };
    let (prompts, before, after) = (answers("prompt "), answers("before "), answers("after "));
    assert_eq!((prompts.len(), before.len(), after.len()), (3, 3, 3), "{}", finished.stdout);
    assert!(before.iter().zip(&after).all(|(before, after)| before != after), "{}", finished.stdout);
    assert!(work.path("mmpo-fast-demo/report.html").is_file());

    // It may be run again over itself, and gives the same.
    let first = work.contents("mmpo-fast-demo/model");
    work.succeed("train");
    assert_eq!(work.contents("mmpo-fast-demo/model"), first);
}
