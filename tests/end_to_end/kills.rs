//! Runs that are killed at random moments lose the steps since their last checkpoint, and nothing else.
//!
//! `MMPO_FAST_KILLS=200 cargo test --release --test end_to_end kills -- --nocapture` kills 200 times, shared by the cases;
//! without it each case is killed twice. `MMPO_FAST_KILL_SEED` repeats the moments of an earlier run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::harness::{TRAIN, Workplace};

/// Steps of a run.
const STEPS: usize = 60;

/// What runs keep, and in which form.
const CASES: [(&str, &str); 5] = [
    ("weights", ""),
    ("adapters", "--lora q,v --lora-rank 4 --lora-dropout 0.1"),
    ("8 bits", "--optimizer-states 8bit --master-weights none"),
    ("layers", "--gradients layer --max-grad-norm 0"),
    ("recompute", "--recompute layer --optimizer-states bf16"),
];

/// A small generator of numbers: the moments need not be good ones, only other ones each time.
struct Moments(u64);

impl Moments {
    fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as f64 / (1u64 << 31) as f64
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} = {text}")))
}

fn seed() -> u64 {
    let now =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    number("MMPO_FAST_KILL_SEED").unwrap_or_else(now)
}

impl Workplace {
    /// The newest step of a run that has a checkpoint; 0 where there is none.
    fn newest(&self, run: &str) -> usize {
        let Ok(folder) = std::fs::read_dir(self.path(&format!("{run}/checkpoints"))) else { return 0 };
        let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max().unwrap_or(0)
    }

    /// What a run leaves that must not depend on kills: models, the last and the best checkpoint.
    fn results(&self, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let root = self.path(run);
        let of_run = |path: PathBuf| path.strip_prefix(&root).unwrap().to_path_buf();
        let all = self.contents(run).into_iter().map(|(path, bytes)| (of_run(path), bytes));
        let last = format!("checkpoints/step-{STEPS:06}/state.safetensors");
        all.filter(|(path, _)| {
            ["model", "adapter", "best"].iter().any(|folder| path.starts_with(folder))
                || path.ends_with(&last)
        })
        .collect()
    }
}

/// Kills a run of `flags` so many times; returns a line about it.
fn kill(work: &Workplace, name: &str, flags: &str, kills: u64, moments: &mut Moments) -> String {
    let run = format!(
        "{TRAIN} --max-steps {STEPS} --save-steps 7 --eval-data pairs.jsonl --eval-steps 5 --keep-best loss {flags}"
    );
    let started = Instant::now();
    work.succeed(&format!("{run} --output whole"));
    let length = started.elapsed().as_secs_f64();
    let (mut done, mut fresh, mut finished, mut lost) = (0, 0, 0, 0);
    while done < kills {
        let before = work.newest("cut");
        let mut child = work.command(&format!("{run} --output cut --resume")).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(length * moments.share() * 0.9));
        if child.try_wait().unwrap().is_some() {
            // It came to its end first: the next one begins from the start.
            finished += 1;
            check_end(work, name);
            std::fs::remove_dir_all(work.path("cut")).unwrap();
            continue;
        }
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        done += 1;
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        if message.contains("resuming after step") {
            let part = format!("resuming after step {before} of");
            assert!(message.contains(&part), "{name}: steps were lost before {before}: {message}");
        }
        let after = work.newest("cut");
        assert!(after >= before, "{name}: the checkpoint of step {before} is gone, {after} is the newest");
        fresh += u64::from(after == 0);
        let metrics = std::fs::read_to_string(work.path("cut/metrics.jsonl")).unwrap_or_default();
        lost += metrics.lines().filter(|line| line.contains("\"loss\"")).count().saturating_sub(after);
        check_record(work, name);
    }
    work.succeed(&format!("{run} --output cut --resume"));
    check_end(work, name);
    for folder in ["whole", "cut", "cache"] {
        std::fs::remove_dir_all(work.path(folder)).unwrap();
    }
    format!(
        "{name}: {kills} kills, {fresh} of them before the first checkpoint; {finished} runs ended before their kill; {lost} \
         steps since a checkpoint were done again; the results are the same to the bit"
    )
}

/// The best checkpoint that the record names is there.
fn check_record(work: &Workplace, name: &str) {
    let Ok(text) = std::fs::read(work.path("cut/run.json")) else { return };
    let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
    if let Some(step) = record["best"]["step"].as_u64() {
        let folder = work.path(&format!("cut/checkpoints/step-{step:06}"));
        assert!(folder.is_dir(), "{name}: the best checkpoint, of step {step}, is gone");
    }
}

fn check_end(work: &Workplace, name: &str) {
    let (whole, cut) = (work.results("whole"), work.results("cut"));
    assert!(whole.len() >= 3, "{name}: {:?}", whole.keys());
    let names = |results: &BTreeMap<PathBuf, Vec<u8>>| results.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&whole), names(&cut), "{name}");
    for (path, bytes) in &whole {
        assert!(*bytes == cut[path], "{name}: {} differs", path.display());
    }
    assert_eq!(work.metrics("whole"), work.metrics("cut"), "{name}");
    let record = |run: &str| {
        let text = work.read(&format!("{run}/run.json"));
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()
    };
    assert_eq!(record("whole"), record("cut"), "{name}");
    let verified = work.run("verify cut");
    assert_eq!(verified.code, Some(0), "{name}: {}", verified.stdout);
}

#[test]
fn kills_cost_no_more_than_the_steps_since_the_last_checkpoint() {
    let seed = seed();
    let kills = number("MMPO_FAST_KILLS").unwrap_or(2 * CASES.len() as u64);
    println!("MMPO_FAST_KILL_SEED={seed}");
    let mut moments = Moments(seed);
    let work = Workplace::new();
    for (number, (name, flags)) in CASES.into_iter().enumerate() {
        let cases = CASES.len() as u64;
        let share = kills / cases + u64::from((number as u64) < kills % cases);
        println!("{}", kill(&work, name, flags, share, &mut moments));
    }
}
