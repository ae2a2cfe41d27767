//! Before the first step: a policy that is not the reference it claims to be, and a cache of another model.

use crate::harness::{TRAIN, Workplace};

const NUMERICS: i32 = 7;

impl Workplace {
    /// Adds `change` to the log-prob of the chosen response of the first pair in each cached reference, and mends the checksum.
    fn falsify_references(&self, change: f32) {
        self.falsify(|record| {
            let logp = f32::from_le_bytes(record[..4].try_into().unwrap());
            record[..4].copy_from_slice(&(logp + change).to_le_bytes());
        });
    }

    /// Adds one to the tokens of a response of the first pair in each cached reference: 0 is the chosen one.
    fn falsify_tokens(&self, response: usize) {
        self.falsify(|record| {
            let count = &mut record[8 + 4 * response..][..4];
            let tokens = u32::from_le_bytes(count[..4].try_into().unwrap());
            count.copy_from_slice(&(tokens + 1).to_le_bytes());
        });
    }

    /// Changes the record of the first pair in each cached reference, and mends the checksum.
    fn falsify(&self, change: impl Fn(&mut [u8])) {
        for path in self.references().into_keys() {
            let bytes = std::fs::read(&path).unwrap();
            let mut content = bytes[..bytes.len() - 32].to_vec();
            let start = content.iter().position(|&byte| byte == b'\n').unwrap() + 1;
            change(&mut content[start..start + 16]);
            let hash = blake3::hash(&content);
            content.extend_from_slice(hash.as_bytes());
            std::fs::write(&path, content).unwrap();
        }
    }
}

#[test]
fn a_cache_of_another_model_ends_the_run_before_its_first_step() {
    let work = Workplace::new();
    for (name, flags) in [
        ("mmpo", ""),
        ("dpo", "--objective dpo"),
        ("lora", "--lora all --lora-rank 4"),
        ("simpo", "--objective simpo --eval-data pairs.jsonl"),
    ] {
        let run = format!("{TRAIN} --max-steps 1 {flags}");
        work.succeed(&format!("{run} --output {name}-first"));
        work.succeed(&format!("{run} --output {name}-second"));
        work.falsify_references(0.5);
        let parts =
            ["self-test before the first step", "of record 1 has log-prob", "cache/reference-", "remove "];
        work.refuse(&format!("{run} --output {name}"), NUMERICS, &parts);
        assert!(!work.path(&format!("{name}/metrics.jsonl")).exists(), "{name}: found after a step");
        std::fs::remove_dir_all(work.path("cache")).unwrap();
        work.succeed(&format!("{run} --output {name}-third"));
    }
}

#[test]
fn a_reference_of_its_own_is_compared_with_its_cache() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --max-steps 2 --output first"));
    std::fs::remove_dir_all(work.path("cache")).unwrap();
    let run =
        format!("{} --reference base --max-steps 1", TRAIN.replace("--model base", "--model first/model"));
    work.succeed(&format!("{run} --output one"));
    // The policy is another model than the reference, which is no fault.
    work.succeed(&format!("{run} --output two"));
    work.falsify_references(0.5);
    work.refuse(&format!("{run} --output three"), NUMERICS, &["under the reference", "cache/reference-"]);
}

/// Log-probs that are right and stand beside another number of tokens would be divided by it, in rewards and in means.
#[test]
fn a_cache_with_other_numbers_of_tokens_ends_the_run_before_its_first_step() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --max-steps 2 --output first"));
    let own = format!("{TRAIN} --max-steps 1");
    let other = own.replace("--model base", "--model first/model") + " --reference base";
    for (name, run, whose) in [("own", own, "the policy"), ("other", other, "the reference")] {
        for (response, side) in ["chosen", "rejected"].into_iter().enumerate() {
            std::fs::remove_dir_all(work.path("cache")).unwrap();
            work.succeed(&format!("{run} --output {name}-{side}-before"));
            work.falsify_tokens(response);
            let output = format!("{name}-{side}");
            let parts: [&str; 3] =
                ["self-test before the first step", &format!("the {side} response of record 1"), whose];
            let finished = work.refuse(&format!("{run} --output {output}"), NUMERICS, &parts);
            let counts: Vec<usize> = finished
                .stderr
                .split('(')
                .filter_map(|part| {
                    part.split_once(" scored tokens)").or(part.split_once(" tokens)"))?.0.parse().ok()
                })
                .collect();
            assert!(counts.len() == 2 && counts[1] == counts[0] + 1, "{counts:?}: {}", finished.stderr);
            assert!(!work.path(&format!("{output}/metrics.jsonl")).exists(), "{name}: found after a step");
        }
    }
}
