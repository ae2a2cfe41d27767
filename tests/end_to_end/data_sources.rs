//! Pairs and models from where they lie: tables, several files, the Hugging Face cache, a share held out, other columns.

use std::path::Path;

use crate::harness::*;

/// The scores of the golden pairs, in the form that a command writes.
fn scores(
    workplace: &Workplace,
    model: &str,
    data: &str,
    more: &str,
) -> Vec<serde_json::Map<String, serde_json::Value>> {
    let line =
        format!("score --model {model} --data {data} --output s.jsonl --device cpu --max-length 160 {more}");
    workplace.succeed(&line);
    workplace.lines("s.jsonl")
}

/// The golden pairs as a CSV table whose columns are called otherwise, with conversations as JSON in the cells.
fn table(workplace: &Workplace, names: [&str; 3]) -> String {
    let quoted = |value: &serde_json::Value| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        format!("\"{}\"", text.replace('"', "\"\""))
    };
    let mut table = names.join(",") + "\n";
    for line in workplace.lines("pairs.jsonl") {
        let row = ["prompt", "chosen", "rejected"].map(|name| quoted(&line[name]));
        table.push_str(&(row.join(",") + "\n"));
    }
    table
}

#[test]
fn a_table_trains_and_scores_like_the_same_pairs_as_json() {
    let workplace = Workplace::new();
    workplace.write("pairs.csv", table(&workplace, ["question", "good", "bad"]));
    let columns = "--columns prompt=question,chosen=good,rejected=bad";
    assert_eq!(
        scores(&workplace, "base", "pairs.csv", columns),
        scores(&workplace, "base", "pairs.jsonl", "")
    );
    workplace.succeed(&format!("{TRAIN} --output json --max-steps 2"));
    let csv = TRAIN.replace("pairs.jsonl", "pairs.csv");
    workplace.succeed(&format!("{csv} --output csv --max-steps 2 {columns}"));
    workplace.assert_same_bits("json", "csv", 2);
    let resolved = String::from_utf8(workplace.read("csv/resolved.toml")).unwrap();
    assert!(resolved.contains("columns = { prompt = \"question\""), "{resolved}");
    workplace.refuse(&format!("{csv} --output o"), 3, &["no column `chosen`"]);
}

#[test]
fn a_share_is_held_out_and_the_run_resumes_with_it() {
    let workplace = Workplace::new();
    workplace.succeed(&format!("{TRAIN} --output whole --eval-split 0.3 --max-steps 4"));
    let evaluations = workplace.series("whole", "eval_loss");
    assert!(!evaluations.is_empty(), "the share is evaluated on");
    workplace.succeed(&format!("{TRAIN} --output cut --eval-split 0.3 --max-steps 4 --save-steps 2"));
    std::fs::remove_dir_all(workplace.path("cut/checkpoints/step-000004")).unwrap();
    std::fs::remove_dir_all(workplace.path("cut/model")).unwrap();
    std::fs::remove_file(workplace.path("cut/report.html")).unwrap();
    workplace.succeed("train --resume --output cut");
    workplace.assert_same_bits("whole", "cut", 4);
    workplace.refuse(
        "train --resume --output whole --eval-split 0.8",
        2,
        &["the pairs are not the same", "cannot be resumed"],
    );
}

/// A cache as `huggingface_hub` lays it out, with the golden model and pairs.
fn cache(workplace: &Workplace) {
    let model = "hub/models--org--base/snapshots/0a1b";
    let data = "hub/datasets--org--pairs/snapshots/2c3d";
    for folder in [model, data, "hub/models--org--base/refs", "hub/datasets--org--pairs/refs"] {
        std::fs::create_dir_all(workplace.path(folder)).unwrap();
    }
    workplace.write("hub/models--org--base/refs/main", "0a1b");
    workplace.write("hub/datasets--org--pairs/refs/main", "2c3d");
    for entry in std::fs::read_dir(workplace.path("base")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), workplace.path(model).join(entry.file_name())).unwrap();
    }
    let lines = String::from_utf8(workplace.read("pairs.jsonl")).unwrap();
    let half = lines.lines().count() / 2;
    let part = |skip: usize, take: usize| lines.lines().skip(skip).take(take).collect::<Vec<_>>().join("\n");
    std::fs::create_dir_all(workplace.path(data).join("data")).unwrap();
    let write =
        |name: &str, text: String| workplace.write(Path::new(data).join(name).to_str().unwrap(), text);
    write("data/train-00000-of-00002.jsonl", part(0, half));
    write("data/train-00001-of-00002.jsonl", part(half, usize::MAX));
    write("data/test-00000-of-00001.jsonl", part(0, 3));
    write("README.md", "---\nlicense: mit\n---\n".into());
}

/// Runs the program where the environment's `variable` alone says where the Hub's cache is.
fn run_with_cache(workplace: &Workplace, arguments: &str, variable: &str, value: &str) -> Finished {
    let mut command = workplace.command(arguments);
    for name in ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    command.env(variable, workplace.path(value));
    finish(command)
}

#[test]
fn names_of_the_hub_stand_for_what_its_cache_on_this_disk_holds() {
    let workplace = Workplace::new();
    cache(&workplace);
    let train = TRAIN.replace("--model base --data pairs.jsonl", "--model org/base --data org/pairs");
    let named = run_with_cache(
        &workplace,
        &format!("{train} --output named --max-steps 2 --eval-data org/pairs:test"),
        "HF_HUB_CACHE",
        "hub",
    );
    assert_eq!(named.code, Some(0), "{}", named.stderr);
    workplace.write(
        "test.jsonl",
        workplace.read("hub/datasets--org--pairs/snapshots/2c3d/data/test-00000-of-00001.jsonl"),
    );
    workplace.succeed(&format!("{TRAIN} --output paths --max-steps 2 --eval-data test.jsonl"));
    workplace.assert_same_bits("named", "paths", 2);
    // The record says which revision was read, so that it can be repeated.
    let resolved = String::from_utf8(workplace.read("named/resolved.toml")).unwrap();
    for part in ["models--org--base/snapshots/0a1b", "datasets--org--pairs/snapshots/2c3d"] {
        assert!(resolved.contains(part), "{resolved}");
    }
    // HF_HOME holds the cache in its folder `hub`.
    let check =
        run_with_cache(&workplace, "check --model org/base@0a1b --data org/pairs --json", "HF_HOME", ".");
    assert_eq!(check.code, Some(0), "{}", check.stderr);
}

#[test]
fn names_that_the_cache_of_the_hub_lacks_are_refused_with_the_way_to_get_them() {
    let workplace = Workplace::new();
    cache(&workplace);
    for (arguments, code, message, fetch) in [
        ("check --model org/none --data org/pairs", 4, "has no model of this name", "hf download org/none`"),
        (
            "check --model org/base --data org/none",
            3,
            "has no data set of this name",
            "hf download org/none --repo-type dataset`",
        ),
        (
            "check --model org/base@beta --data org/pairs",
            4,
            "without the revision `beta`; it holds 0a1b",
            "--revision beta`",
        ),
        (
            "check --model org/base --data org/pairs:validation",
            3,
            "no files of a split `validation`",
            "after the colon",
        ),
        ("check --model org/base --data base/none.jsonl", 5, "base/none.jsonl", "check the path"),
    ] {
        let refused = run_with_cache(&workplace, arguments, "HF_HUB_CACHE", "hub");
        assert_eq!(refused.code, Some(code), "{arguments}: {}", refused.stderr);
        for part in [message, fetch] {
            assert!(refused.stderr.contains(part), "{arguments}: no {part:?} in {}", refused.stderr);
        }
    }
}

#[test]
fn the_date_of_a_template_can_be_pinned() {
    let workplace = Workplace::new();
    let template = "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{{ message.role }}: {{ message.content }}\
                    {{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    workplace.write("dated.jinja", template);
    let pair = serde_json::json!({"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant",
                                  "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}]});
    workplace.write("one.jsonl", pair.to_string());
    let check = "check --model base --data one.jsonl --chat-template dated.jinja --show 1";
    let dated = workplace.succeed(&format!("{check} --template-date 2024-07-26")).stdout;
    assert!(dated.contains("26 Jul 2024user: Hi"), "{dated}");
    let today = workplace.succeed(check).stdout;
    assert!(!today.contains("26 Jul 2024"), "{today}");
}

/// Every command that renders conversations takes the date, and has what the template writes for it in its texts.
#[test]
fn every_command_renders_with_the_pinned_date() {
    let workplace = Workplace::new();
    let past = "It was a long, long time ago. ";
    let turns = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}\
                 {% if add_generation_prompt %}assistant: {% endif %}";
    workplace
        .write("dated.jinja", format!("{{% if strftime_now('%Y') == '2001' %}}{past}{{% endif %}}{turns}"));
    let dates = ["2001-07-26", "2002-07-26", "2003-07-26"];
    let dated = |command: &str| {
        dates.map(|date| {
            let command = command.replace("YEAR", &date[..4]);
            let options = "--chat-template dated.jinja --template-date";
            workplace.succeed(&format!("{command} {options} {date}")).stdout
        })
    };
    let pairs =
        "--model base --data pairs.jsonl --max-length 160 --max-prompt-length 64 --device cpu --threads 1";
    let plans = dated(&format!("plan {pairs} --json")).map(|text| {
        let plan: serde_json::Value = serde_json::from_str(&text).unwrap();
        plan["memory"].clone()
    });
    assert!(plans[0] != plans[1] && plans[1] == plans[2], "{plans:?}");

    dated(&format!("score {pairs} --output YEAR.jsonl"));
    let scores = ["2001", "2002", "2003"].map(|year| workplace.read(&format!("{year}.jsonl")));
    assert!(scores[0] != scores[1] && scores[1] == scores[2]);

    dated(&format!("{TRAIN} --max-steps 1 --output run-YEAR"));
    let losses = ["2001", "2002", "2003"].map(|year| workplace.series(&format!("run-{year}"), "loss"));
    assert!(losses[0] != losses[1] && losses[1] == losses[2], "{losses:?}");
    // The date is the run's: it is resumed with it, and not with one of other texts.
    let finished = workplace.succeed("train --resume --output run-2001");
    assert!(finished.stderr.contains("is finished"), "{}", finished.stderr);
    workplace.refuse(
        "train --resume --output run-2001 --template-date 2002-07-26",
        2,
        &["cannot be resumed"],
    );
    workplace.succeed("train --resume --output run-2002 --template-date 2003-07-26");

    let answers = dated("generate --model base --device cpu --max-new-tokens 24 --prompt Hello");
    let raw = |beginning: &str| {
        let mut command = workplace.command("generate --model base --device cpu --max-new-tokens 24 --raw");
        command.args(["--prompt", &format!("{beginning}user: Hello<|im_end|>assistant: ")]);
        finish(command).stdout
    };
    assert_eq!(answers, [raw(past), raw(""), raw("")]);
    assert_ne!(answers[0], answers[1]);
}
