//! Recipes and flags become one configuration: precedence, ranges, options of other objectives, and the way back.

use std::path::{Path, PathBuf};

use mmpo_fast::config::options::{Options, Origin, flag_name, rows};
use mmpo_fast::config::recipe::{self, RESOLVED_FILE};
use mmpo_fast::config::{
    ColumnNames, GradientConfig, LengthLimits, MemoryConfig, PairFiles, Policy, RunConfig, Warmup, resolve,
};
use mmpo_fast::model::{HeadChoice, HeadOptions, Recompute};
use mmpo_fast::objective::{DESCRIPTORS, Dpo, Mmpo, Objective, Simpo};
use mmpo_fast::optimizer::{MasterWeights, MomentFormat, Schedule, StateOptions};
use mmpo_fast::{Error, Result};
use proptest::prelude::*;

const FILES: &str = "model = \"m\"\ndata = \"d.jsonl\"\noutput = \"o\"\n";

fn flags(given: &[(&str, &str)]) -> Result<Options> {
    let mut options = Options::default();
    for (name, text) in given {
        let row =
            rows().into_iter().find(|row| row.name == *name).unwrap_or_else(|| panic!("no option {name}"));
        (row.put_text)(&mut options, text, Origin::Flag)?;
    }
    Ok(options)
}

/// A recipe of the three files and `text`, with flags before it.
fn run(text: &str, given: &[(&str, &str)]) -> Result<RunConfig> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, format!("{FILES}{text}")).unwrap();
    resolve(flags(given)?, Some(&path), false)
}

fn refusal(result: Result<RunConfig>) -> String {
    match result {
        Err(Error::Config { message, help }) => {
            assert!(!help.is_empty(), "no advice with `{message}`");
            message
        }
        other => panic!("expected a configuration error, got {other:?}"),
    }
}

fn mmpo(config: &RunConfig) -> Mmpo {
    match config.objective {
        Objective::Mmpo(mmpo) => mmpo,
        ref other => panic!("expected mmpo, got {other:?}"),
    }
}

#[test]
fn defaults_are_those_of_the_documents() {
    let config = run("", &[]).unwrap();
    assert_eq!(
        mmpo(&config),
        Mmpo {
            beta: 0.05,
            epsilon: 0.9,
            reward_group: 2,
            reward_normalize: true,
            length_normalize: false,
            preference_weight: 0.0,
            entropy_weight: 0.0
        }
    );
    assert_eq!((config.limits.max_length, config.limits.max_prompt_length), (2312, 1800));
    assert_eq!((config.seed, config.batch.pairs_per_step), (42, None));
    assert_eq!((config.schedule.kind, config.schedule.warmup), (Schedule::Cosine, Warmup::Ratio(0.1)));
    assert_eq!((config.schedule.epochs, config.schedule.max_steps), (1.0, None));
    assert_eq!((config.optimizer.learning_rate, config.optimizer.max_grad_norm), (1e-4, Some(1.0)));
    let dpo = run("objective = \"dpo\"", &[]).unwrap();
    assert_eq!(dpo.objective, Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 }));
    assert_eq!(dpo.optimizer.learning_rate, 1e-5);
    let simpo = run("objective = \"simpo\"", &[]).unwrap();
    assert_eq!(simpo.objective, Objective::Simpo(Simpo { beta: 2.0, gamma_beta_ratio: 0.5 }));
}

#[test]
fn a_flag_goes_before_the_recipe_and_the_recipe_before_the_default() {
    let config =
        run("beta = 0.2\nepsilon = 0.8\nseed = 7", &[("beta", "0.3"), ("objective", "mmpo")]).unwrap();
    assert_eq!((mmpo(&config).beta, mmpo(&config).epsilon, config.seed), (0.3, 0.8, 7));
}

#[test]
fn one_of_two_rivals_replaces_the_other_from_below_and_only_there() {
    let config = run("epochs = 3\nwarmup_ratio = 0.2", &[("max_steps", "9"), ("warmup_steps", "4")]).unwrap();
    assert_eq!((config.schedule.max_steps, config.schedule.warmup), (Some(9), Warmup::Steps(4)));
    for (text, second) in
        [("warmup_ratio = 0.1\nwarmup_steps = 3", "warmup_steps"), ("max_steps = 3\nepochs = 2", "max_steps")]
    {
        let message = refusal(run(text, &[]));
        assert!(message.contains(second) && message.contains("together"), "{message}");
    }
}

#[test]
fn entropy_weight_may_be_beta() {
    let config = run("beta = 0.5\nentropy_weight = \"beta\"", &[]).unwrap();
    assert_eq!(mmpo(&config).entropy_weight, 0.5);
    assert_eq!(mmpo(&run("", &[("beta", "0.25"), ("entropy_weight", "beta")]).unwrap()).entropy_weight, 0.25);
}

#[test]
fn defaults_follow_the_options_they_depend_on() {
    let config = run("max_length = 512\npairs_per_step = 1", &[]).unwrap();
    assert_eq!((config.limits.max_prompt_length, mmpo(&config).reward_group), (512 * 1800 / 2312, 1));
    assert_eq!(run("max_length = 4096", &[]).unwrap().limits.max_prompt_length, 1800);
    assert_eq!(run("max_length = 2", &[]).unwrap().limits.max_prompt_length, 1);
    let within = |text: &str, context| run(text, &[]).unwrap().asked_lengths.limits(Some(context)).unwrap();
    let lengths = |limits: LengthLimits| (limits.max_length, limits.max_prompt_length);
    assert_eq!(lengths(within("", 512)), (512, 512 * 1800 / 2312));
    assert_eq!(lengths(within("", 8192)), (2312, 1800));
    assert_eq!(lengths(within("", 1)), (2, 1));
    assert_eq!(lengths(within("max_length = 4096", 512)), (4096, 1800));
    let short = run("max_prompt_length = 600", &[]).unwrap().asked_lengths;
    assert!(short.limits(Some(512)).unwrap_err().to_string().contains("leaves no room"));
    assert_eq!(run("max_grad_norm = 0", &[]).unwrap().optimizer.max_grad_norm, None);
}

#[test]
fn small_files_have_small_steps_unless_a_number_is_given() {
    let config = run("", &[]).unwrap();
    for (pairs, per_step) in [
        (1, 2),
        (20, 2),
        (50, 2),
        (79, 2),
        (80, 4),
        (120, 4),
        (200, 8),
        (2559, 64),
        (2560, 128),
        (1_000_000, 128),
    ] {
        assert_eq!(config.pairs_per_step(pairs), per_step, "{pairs} pairs");
        assert!(pairs < 40 || pairs.div_ceil(per_step) >= 20, "{pairs} pairs");
    }
    let given = run("pairs_per_step = 128", &[]).unwrap();
    assert_eq!(given.pairs_per_step(20), 128, "a number that is given is kept");
    // A group of rewards lies in one step.
    let group = run("reward_group = 6", &[]).unwrap();
    assert_eq!((group.pairs_per_step(20), group.pairs_per_step(200)), (6, 8));
    assert!(refusal(run("reward_group = 129", &[])).contains("more than the pairs of a step"));
}

#[test]
fn what_is_recorded_can_be_read_from_any_folder() {
    let config = run("eval_data = './e/../e.jsonl'", &[("model", "./m/"), ("reference", "r")]).unwrap();
    let recorded = config.recorded(120).unwrap();
    let here = std::env::current_dir().unwrap();
    let file = |files: &Option<PairFiles>| files.as_ref().map(|files| files.0[0].path.clone());
    for (path, name) in [
        (recorded.model.as_ref(), "m"),
        (file(&recorded.data).as_ref(), "d.jsonl"),
        (recorded.reference.as_ref(), "r"),
        (Some(&recorded.output), "o"),
    ] {
        assert_eq!(path.unwrap(), &here.join(name));
    }
    assert!(file(&recorded.evaluation.data).unwrap().is_absolute());
    assert_eq!(recorded.batch.pairs_per_step, Some(4));
    assert_eq!(recorded.recorded(120).unwrap(), recorded);
    let demo = resolve(Options::default(), None, false).unwrap().recorded(640).unwrap();
    assert_eq!((demo.model, demo.data), (None, None), "what is built in has no path");
}

#[test]
fn a_warm_up_may_be_longer_than_the_run() {
    let config = run("warmup_steps = 5\nmax_steps = 3", &[]).unwrap();
    assert_eq!((config.schedule.warmup, config.schedule.max_steps), (Warmup::Steps(5), Some(3)));
}

#[test]
fn the_head_may_be_told_its_mode_and_workspace() {
    assert_eq!(run("", &[]).unwrap().head, HeadOptions { mode: HeadChoice::Auto, workspace: 1 << 30 });
    let config = run("head_mode = \"main\"\nhead_workspace = 256", &[("head_mode", "recompute")]).unwrap();
    assert_eq!(config.head, HeadOptions { mode: HeadChoice::Recompute, workspace: 256 << 20 });
    assert_round_trip(&config);
    let message = refusal(run("head_mode = \"recomputed\"", &[]));
    assert!(message.contains("run.toml:4: ") && message.contains("did you mean `recompute`?"), "{message}");
    assert!(refusal(run("head_workspace = 0", &[])).contains("at least 1"));
}

#[test]
fn what_is_kept_on_the_device_is_told_in_words() {
    assert_eq!(run("", &[]).unwrap().memory, MemoryConfig::default());
    let text = "optimizer_states = \"bf16\"\nmaster_weights = \"none\"\nrecompute = \"selective\"";
    let config = run(text, &[("optimizer_states", "8bit")]).unwrap();
    let states = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::None };
    let gradients = GradientConfig::F32;
    assert_eq!(
        config.memory,
        MemoryConfig { states, recompute: Recompute::Selective, gradients, ..MemoryConfig::default() }
    );
    assert_round_trip(&config);
    let message = refusal(run("optimizer_states = \"8bits\"", &[]));
    assert!(message.contains("run.toml:4: ") && message.contains("did you mean `8bit`?"), "{message}");
    // Clipping needs all gradients at once.
    let message = refusal(run("gradients = \"layer\"", &[]));
    assert!(message.contains("`gradients` = layer") && message.contains("`max_grad_norm` = 1"), "{message}");
    let config = run("gradients = \"layer\"\nmax_grad_norm = 0", &[]).unwrap();
    assert_eq!(config.memory.gradients, GradientConfig::Layer);
    assert_round_trip(&config);
}

#[test]
fn pairs_may_come_from_several_places_with_weights_and_other_columns() {
    let sources = |config: &RunConfig| -> Vec<(String, f64)> {
        let files = &config.data.as_ref().unwrap().0;
        files.iter().map(|file| (file.path.display().to_string(), file.weight)).collect()
    };
    let flags =
        [("data", "a.jsonl,b=0.5,org/pairs:train_prefs=2"), ("columns", "prompt=question,chosen=good one")];
    let config = run("", &flags).unwrap();
    let expected = [("a.jsonl".into(), 1.0), ("b".into(), 0.5), ("org/pairs:train_prefs".into(), 2.0)];
    assert_eq!(sources(&config), expected);
    let columns =
        [("prompt", "question"), ("chosen", "good one")].map(|(a, b)| (a.to_string(), b.to_string()));
    assert_eq!(config.columns, ColumnNames(columns.to_vec()));
    assert_round_trip(&config);

    let text = "columns = { prompt = 'a=b', rejected = 'c,d' }\ntemplate_date = 2024-07-26\neval_split = 0.25\n\
                eval_steps = 3\non_identical = \"drop\"\non_after_end = \"cut\"";
    let config = run(text, &[]).unwrap();
    assert_eq!(config.columns.read_as("c,d"), Some("rejected"));
    assert_eq!(config.columns.read_as("prompt"), None, "another column is the prompt");
    assert_eq!((config.evaluation.split, config.policies.after_end), (Some(0.25), Policy::Cut));
    assert!(config.to_toml().contains("template_date = \"2024-07-26T12:00:00\""), "{}", config.to_toml());
    assert_round_trip(&config);
    let message = refusal(run("eval_data = 'e'\neval_split = 0.5", &[]));
    assert!(message.contains("`eval_split` cannot be given together with `eval_data`"), "{message}");

    // A path with the separators in it is one path where it exists, and always in a list.
    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join("a,b=0.5");
    std::fs::write(&odd, "").unwrap();
    let config = run("", &[("data", odd.to_str().unwrap())]).unwrap();
    assert_eq!(sources(&config), [(odd.display().to_string(), 1.0)]);
    assert_round_trip(&config);
}

#[test]
fn an_unknown_key_names_the_nearest_with_file_and_line() {
    for (text, line, expected) in [
        ("# a remark\nleraning_rate = 1e-4", 5, "unknown key `leraning_rate`; did you mean `learning_rate`?"),
        ("learning-rate = 1e-4", 4, "did you mean `learning_rate`?"),
        ("\n\nnum_train_epochs = 3", 6, "did you mean `epochs`?"),
        ("[optimizer]\nlearning_rate = 1e-4", 4, "unknown key `optimizer`"),
        ("resume = true", 4, "is a flag"),
        ("beta = ", 4, "not TOML"),
        ("beta = 0.1\nbeta = 0.2", 5, "not TOML"),
    ] {
        let message = refusal(run(text, &[]));
        assert!(message.contains(&format!("run.toml:{line}: ")), "{text}: {message}");
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn an_option_of_another_objective_is_refused() {
    for (text, expected) in [
        (
            "label_smoothing = 0.1",
            "run.toml:4: `label_smoothing` belongs to dpo, and the objective is mmpo (by default)",
        ),
        ("objective = \"dpo\"\nlength_normalize = true", "run.toml:5: `length_normalize` belongs to mmpo"),
        ("objective = \"sft\"\nbeta = 0.1", "`beta` belongs to mmpo, dpo, simpo"),
        (
            "objective = \"ipo\"\nlabel_smoothing = 0.1",
            "`label_smoothing` belongs to dpo, and the objective is ipo",
        ),
        (
            "objective = \"orpo\"\nlabel_smoothing = 0.1",
            "`label_smoothing` belongs to dpo, and the objective is orpo",
        ),
        ("objective = \"orpo\"\nreference = \"r\"", "`reference` belongs to mmpo, dpo"),
        (
            "objective = \"hinge\"\ngamma_beta_ratio = 1.0",
            "`gamma_beta_ratio` belongs to simpo, and the objective is hinge",
        ),
        ("objective = \"simpo\"\nreference = \"r\"", "`reference` belongs to mmpo, dpo"),
        ("objective = \"dpo\"\ngamma_beta_ratio = 1.0", "`gamma_beta_ratio` belongs to simpo"),
        ("reward_group = 4\nreward_normalize = false", "`reward_group` has no effect"),
        ("eval_steps = 4", "`eval_steps` has no effect without `eval_data`"),
    ] {
        let message = refusal(run(text, &[]));
        assert!(message.contains(expected), "{text}: {message}");
    }
    let message = refusal(run("reward_group = 4", &[("objective", "dpo")]));
    assert!(message.contains("the objective is dpo (by --objective)"), "{message}");
}

#[test]
fn values_out_of_range_or_of_the_wrong_kind_are_refused() {
    for (text, rule) in [
        ("beta = 0", "must be finite and greater than 0"),
        ("beta = nan", "must be finite and greater than 0"),
        ("learning_rate = inf", "must be finite"),
        ("learning_rate = -1e-4", "must be finite and greater than 0"),
        ("learning_rate = \"fast\"", "must be a number, not the string \"fast\""),
        ("adam_beta1 = 1.0", "at least 0 and less than 1"),
        ("adam_beta2 = -0.1", "at least 0 and less than 1"),
        ("adam_epsilon = 0", "greater than 0"),
        ("weight_decay = -1", "at least 0"),
        ("epsilon = 0.4", "from 0.5 to 1"),
        ("epsilon = 1.1", "from 0.5 to 1"),
        ("warmup_ratio = 1.5", "from 0 to 1"),
        ("epochs = 0", "greater than 0"),
        ("max_steps = 0", "at least 1"),
        ("max_steps = 2.5", "whole number"),
        ("pairs_per_step = 0", "at least 1"),
        ("pairs_per_step = -3", "whole number"),
        ("tokens_per_micro_batch = 0", "at least 1"),
        ("reward_group = 0", "at least 1"),
        ("reward_group = 8\npairs_per_step = 4", "more than the pairs of a step"),
        ("reward_normalize = 1", "must be true or false, not 1"),
        ("entropy_weight = \"alpha\"", "a number or \"beta\""),
        ("preference_weight = -0.5", "at least 0"),
        ("max_length = 1", "at least 2"),
        ("max_length = 100\nmax_prompt_length = 100", "leaves no room"),
        ("seed = 9223372036854775808", "must be"),
        ("schedule = \"cosin\"", "did you mean `cosine`?"),
        ("objective = \"ppo\"", "one of mmpo, dpo, simpo, sft"),
        ("objective = 3", "not 3"),
        ("device = \"tpu\"", "auto, cpu, cuda"),
        ("keep_checkpoints = 0", "at least 1"),
        ("threads = 0", "at least 1"),
        ("chat_template = \"\"", "must name a file"),
        ("eval_data = [1, 2]", "must be a path in quotes, or a list of paths"),
        ("eval_data = []", "is an empty list"),
        ("eval_data = \"a=0\"", "weight 0 for a, which must be greater than 0"),
        ("eval_data = \"a=much\"", "`much` is no number"),
        ("eval_data = [{ path = \"a\", share = 1 }]", "a source has `path` and `weight`"),
        ("columns = \"prompt\"", "must be NAME=COLUMN"),
        ("columns = { promt = \"q\" }", "did you mean `prompt`?"),
        ("columns = { prompt = \"q\", question = \"q\" }", "reads `q` as two columns"),
        ("columns = { prompt = 1 }", "must name a column in quotes for `prompt`, not 1"),
        ("eval_split = 1.0", "greater than 0 and less than 1"),
        ("template_date = \"yesterday\"", "must be a date such as"),
        ("on_empty = \"keep\"", "must be drop or error"),
        ("on_long_prompt = \"keep\"", "must be cut, drop or error"),
        ("on_identical = \"cut\"", "there is nothing to cut"),
        ("on_identical = \"dropp\"", "did you mean `drop`?"),
    ] {
        let message = refusal(run(text, &[]));
        assert!(message.contains(rule), "{text}: {message}");
    }
    let message = refusal(run("objective = \"dpo\"\nlabel_smoothing = 0.5", &[]));
    assert!(message.contains("run.toml:5: `label_smoothing` = 0.5 must be"), "{message}");
}

#[test]
fn without_model_and_data_the_demo_runs_and_half_of_them_is_an_error() {
    let demo = resolve(Options::default(), None, false).unwrap();
    assert_eq!((&demo.model, &demo.data), (&None, &None));
    let longer = resolve(flags(&[("epochs", "7"), ("output", "there")]).unwrap(), None, false).unwrap();
    assert_eq!((longer.schedule.epochs, longer.output), (7.0, PathBuf::from("there")));
    for (given, missing) in [
        (&[("model", "m"), ("output", "o")][..], "--data missing"),
        (&[("data", "d"), ("output", "o")], "--model missing"),
        (&[("model", "m"), ("data", "d")], "--output missing"),
        (&[("model", "m")], "--data and --output missing"),
    ] {
        let message = refusal(resolve(flags(given).unwrap(), None, false));
        assert!(message.contains(missing), "{message}");
    }
}

#[test]
fn the_demo_takes_every_objective() {
    for objective in DESCRIPTORS {
        let config = resolve(flags(&[("objective", objective.name)]).unwrap(), None, false).unwrap();
        assert_eq!(config.objective.name(), objective.name);
    }
}

#[test]
fn a_recipe_without_files_does_not_fall_back_to_the_demo() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, "beta = 0.1").unwrap();
    let message = refusal(resolve(Options::default(), Some(&path), false));
    assert!(message.contains("--model and --data and --output missing"), "{message}");
}

#[test]
fn a_missing_recipe_is_an_input_error_with_its_path() {
    let error = resolve(Options::default(), Some(Path::new("nowhere.toml")), false).unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("nowhere.toml"), "{error}");
}

#[test]
fn resume_with_the_output_alone_takes_up_that_runs_options() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().to_str().unwrap();
    let message = refusal(resolve(flags(&[("output", output)]).unwrap(), None, true));
    assert!(message.contains("nothing to resume") && message.contains(RESOLVED_FILE), "{message}");

    let saved = run("beta = 0.3\nepochs = 4", &[("output", output)]).unwrap();
    std::fs::write(folder.path().join(RESOLVED_FILE), saved.to_toml()).unwrap();
    let resumed = resolve(flags(&[("output", output)]).unwrap(), None, true).unwrap();
    // Lengths that followed the defaults are given ones now.
    assert_eq!(resumed, RunConfig { resume: true, asked_lengths: resumed.asked_lengths, ..saved });
    assert_eq!(resumed.asked_lengths.max_length, Some(2312));

    // The same line begins the demo and goes on with it.
    let demo = resolve(Options::default(), None, true).unwrap();
    assert_eq!(demo, RunConfig { resume: true, ..resolve(Options::default(), None, false).unwrap() });
}

#[test]
fn shipped_recipes_hold_options_that_exist() {
    let files = [("model", "m"), ("data", "d"), ("output", "o")];
    let mut seen = 0;
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        let config =
            resolve(flags(&files).unwrap(), Some(&path), false).unwrap_or_else(|error| panic!("{error}"));
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            stem == "demo" || stem.ends_with(config.objective.name()),
            "{stem}: {}",
            config.objective.name()
        );
        seen += 1;
    }
    assert!(seen >= 7, "only {seen} recipes");
}

#[test]
fn options_have_distinct_names_and_help() {
    let rows = rows();
    for (index, row) in rows.iter().enumerate() {
        assert!(!row.documentation.is_empty() && !row.default.is_empty(), "{}", row.name);
        assert!(rows[index + 1..].iter().all(|other| other.name != row.name), "{} twice", row.name);
        assert!(row.help().contains("[default: "), "{}", row.help());
    }
    assert_eq!(flag_name("tokens_per_micro_batch"), "--tokens-per-micro-batch");
}

/// A descriptor can only list options that exist, and an option that not all objectives have is listed by one.
#[test]
fn descriptors_and_options_agree() {
    let rows = rows();
    for objective in DESCRIPTORS {
        for option in objective.options {
            let row = rows.iter().find(|row| row.name == option.name);
            let row = row.unwrap_or_else(|| panic!("{}: no option {}", objective.name, option.name));
            assert!(row.only.contains(&objective.kind), "{}: {}", objective.name, option.name);
        }
        let help = rows.iter().find(|row| row.name == "objective").unwrap().help();
        let described = format!("{}: {} ({})", objective.name, objective.help, objective.source);
        assert!(help.contains(&described), "{help}");
        assert!(run(&format!("objective = \"{}\"", objective.name), &[]).is_ok(), "{}", objective.name);
    }
    for row in rows {
        assert!(!row.only.is_empty(), "{} belongs to no objective", row.name);
    }
}

/// Each objective takes every option that its descriptor lists, and refuses every other one by name.
#[test]
fn every_objective_takes_its_own_options_and_no_others() {
    for objective in DESCRIPTORS {
        for row in rows().iter().filter(|row| row.only.len() < DESCRIPTORS.len()) {
            let value = match row.placeholder {
                "NUMBER" | "NUMBER|beta" if row.name == "label_smoothing" => "0.25",
                "NUMBER" | "NUMBER|beta" => "0.75",
                "COUNT" => "3",
                "true|false" => "true",
                _ => "path",
            };
            let result = run("", &[("objective", objective.name), (row.name, value)]);
            if row.only.contains(&objective.kind) {
                let config = result.unwrap_or_else(|error| panic!("{}: {error}", objective.name));
                assert!(config.to_toml().contains(&format!("\n{} = ", row.name)), "{}", config.to_toml());
                assert_round_trip(&config);
            } else {
                let message = refusal(result);
                let name = flag_name(row.name);
                assert!(message.contains(&format!("`{name}` belongs to ")), "{message}");
                assert!(message.contains(&format!("the objective is {} ", objective.name)), "{message}");
            }
        }
    }
}

/// What goes out as a resolved recipe comes back as the same configuration, but that all lengths are given ones now.
fn assert_round_trip(config: &RunConfig) {
    let text = config.to_toml();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(RESOLVED_FILE);
    std::fs::write(&path, &text).unwrap();
    let back =
        resolve(Options::default(), Some(&path), false).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(back.asked_lengths.limits(Some(64)).unwrap(), config.limits, "{text}");
    assert_eq!(back, RunConfig { asked_lengths: back.asked_lengths, ..config.clone() }, "{text}");
    assert_eq!(back.to_toml(), text);
}

#[test]
fn the_demo_and_odd_paths_round_trip() {
    assert_round_trip(&resolve(Options::default(), None, false).unwrap());
    let odd = [("output", "a \"quoted\" \\ back\tslash é"), ("model", "./builtin:demo")];
    let config =
        run("reward_normalize = false\nmax_grad_norm = 0\neval_data = 'e'\neval_steps = 5", &odd).unwrap();
    assert_eq!(config.model, Some(PathBuf::from("./builtin:demo")));
    assert_round_trip(&config);
}

proptest! {
    #[test]
    fn resolved_recipes_round_trip(
        objective in prop::sample::select(DESCRIPTORS),
        beta in 1e-6f64..100.0,
        learning_rate in 1e-9f64..1.0,
        adam_epsilon in 1e-300f64..1e-3,
        warmup in prop::option::of(0usize..50),
        max_steps in prop::option::of(50usize..1_000_000),
        epochs in 1e-3f64..50.0,
        seed in 0u64..=i64::MAX as u64,
        pairs in 1usize..4096,
        max_length in 2usize..100_000,
        device in prop::sample::select(vec!["auto", "cpu", "cuda:0", "cuda:3", "emulated"]),
        threads in prop::option::of(1usize..64),
    ) {
        let mut text = format!(
            "objective = \"{}\"\nlearning_rate = {learning_rate:e}\nadam_epsilon = {adam_epsilon:e}\n\
             seed = {seed}\npairs_per_step = {pairs}\nmax_length = {max_length}\ndevice = \"{device}\"\n",
            objective.name
        );
        if objective.option("beta").is_some() {
            text.push_str(&format!("beta = {beta:e}\n"));
        }
        match max_steps {
            Some(steps) => text.push_str(&format!("max_steps = {steps}\n")),
            None => text.push_str(&format!("epochs = {epochs:e}\n")),
        }
        if let Some(steps) = warmup {
            text.push_str(&format!("warmup_steps = {steps}\n"));
        }
        if let Some(threads) = threads {
            text.push_str(&format!("threads = {threads}\n"));
        }
        assert_round_trip(&run(&text, &[]).unwrap());
    }
}

#[test]
fn recipe_parsing_keeps_lines() {
    let options = recipe::parse("\nbeta = 0.2\n", Path::new("r.toml")).unwrap();
    let origin = options.beta.unwrap().origin;
    assert_eq!(origin, Origin::Recipe { path: PathBuf::from("r.toml"), line: 2 });
    assert_eq!(origin.name("beta"), "r.toml:2: `beta`");
}

/// PowerShell's `>` and old Notepads write UTF-16, others a byte order mark and `\r\n`.
#[test]
fn recipes_from_windows_are_read_or_told_their_encoding() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        resolve(Options::default(), Some(&path), false)
    };
    let text = format!("{FILES}seed = 7\n").replace('\n', "\r\n");
    assert_eq!(read(text.as_bytes()).unwrap().seed, 7);
    assert_eq!(read(format!("\u{feff}{text}").as_bytes()).unwrap().seed, 7);
    let wide: Vec<u8> = [0xfeff].into_iter().chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    match read(&wide) {
        Err(Error::Config { message, help }) => {
            assert!(message.contains("run.toml: not UTF-8 text, from byte 0 on"), "{message}");
            assert!(help.contains("iconv -f UTF-16"), "{help}");
        }
        other => panic!("{other:?}"),
    }
    let message = refusal(read(&vec![b'#'; 2 << 20]));
    assert!(message.contains("too many for a configuration"), "{message}");
}
