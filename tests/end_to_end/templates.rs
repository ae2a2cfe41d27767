//! The chat template that a run was given, in the folder that it saves.

use serde_json::{Value, json};

use crate::harness::{Workplace, finish};

const FLAGS: &str = "--data pairs.jsonl --max-length 160 --max-prompt-length 64 --pairs-per-step 4 --max-steps 1 \
                     --learning-rate 1e-7 --device cpu";

impl Workplace {
    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// The base model, without the end of its turns among its end tokens.
    fn forget_the_end_of_turns(&self) {
        let mut config = self.json("base/config.json");
        config["eos_token_id"] = json!(0);
        self.write("base/config.json", config.to_string());
        if self.path("base/generation_config.json").exists() {
            std::fs::remove_file(self.path("base/generation_config.json")).unwrap();
        }
    }

    fn answer_of(&self, model: &str) -> String {
        let mut command = self.command(&format!("generate --model {model} --device cpu --max-new-tokens 60"));
        command.args(["--prompt", "Name three colours."]);
        finish(command).stdout
    }
}

#[test]
fn a_trained_model_stops_where_its_template_ends_a_turn() {
    let work = Workplace::new();
    work.forget_the_end_of_turns();
    work.succeed(&format!("train --model base --output run {FLAGS}"));
    assert_eq!(work.json("run/model/generation_config.json")["eos_token_id"], json!([0, 2]));
    assert_eq!(work.json("run/model/config.json")["eos_token_id"], json!(0));
    assert_eq!(work.answer_of("run/model"), "Red, green and blue.\n");
    // The template of a generation counts too, whatever the files say.
    assert_eq!(work.answer_of("base"), "Red, green and blue.\n");
}

/// What ends a turn ends an answer of a conversation alone. Plain text goes on to the model's own end tokens.
#[test]
fn plain_text_goes_on_beyond_the_end_of_a_turn() {
    let work = Workplace::new();
    work.forget_the_end_of_turns();
    let mut command = work.command("generate --model base --device cpu --max-new-tokens 14 --raw");
    command.args(["--prompt", "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"]);
    let answer = finish(command).stdout;
    let turn = "Red, green and blue.";
    assert!(answer.starts_with(turn) && answer.len() > turn.len() + 1, "{answer:?}");
}

/// The samples on the page of a run are answers of the model that it saves: they end where that model stops.
#[test]
fn the_samples_of_a_run_end_where_its_template_ends_a_turn() {
    let work = Workplace::new();
    let samples = |run: &str| -> Vec<String> {
        work.succeed(&format!("train --model base --output {run} {FLAGS}"));
        let page = String::from_utf8(work.read(&format!("{run}/report.html"))).unwrap();
        let articles = page.split("<article class=\"sample\">").skip(1);
        articles.map(|article| article.split("</article>").next().unwrap().to_string()).collect()
    };
    let known = samples("known");
    assert!(known.len() == 3 && known[2].contains("<p>Red, green and blue.</p>"), "{known:?}");
    work.forget_the_end_of_turns();
    assert_eq!(samples("forgotten"), known);
}

#[test]
fn a_chosen_template_is_saved_as_the_default() {
    let work = Workplace::new();
    let own = work.read("base/chat_template.jinja");
    std::fs::create_dir(work.path("base/additional_chat_templates")).unwrap();
    work.write("base/additional_chat_templates/named.jinja", [b"{# named #}", own.as_slice()].concat());
    work.write("base/additional_chat_templates/tool_use.jinja", "tools");
    work.write("file.jinja", [b"{# file #}", own.as_slice()].concat());
    for (choice, mark) in [("named", "{# named #}"), ("file.jinja", "{# file #}")] {
        work.succeed(&format!("train --model base --chat-template {choice} --output run-{choice} {FLAGS}"));
        let model = format!("run-{choice}/model");
        let saved = String::from_utf8(work.read(&format!("{model}/chat_template.jinja"))).unwrap();
        assert!(saved.starts_with(mark), "{saved}");
        assert!(work.path(&format!("{model}/additional_chat_templates/named.jinja")).exists());
        // With a template chosen, that was the one for tools as well.
        assert!(!work.path(&format!("{model}/additional_chat_templates/tool_use.jinja")).exists());
        assert_eq!(work.answer_of(&model), "Red, green and blue.\n");
    }
    work.refuse(
        &format!("train --model base --chat-template other --output run {FLAGS}"),
        2,
        &["--chat-template other", "default, named, tool_use"],
    );
    work.succeed(&format!("train --model base --output run {FLAGS}"));
    assert_eq!(work.read("run/model/chat_template.jinja"), own);
    assert_eq!(work.read("run/model/additional_chat_templates/tool_use.jinja"), b"tools");
}

#[test]
fn a_template_without_bounds_is_a_fault_of_the_model() {
    let work = Workplace::new();
    work.write(
        "endless.jinja",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    );
    work.refuse(
        &format!("train --model base --chat-template endless.jinja --output run {FLAGS}"),
        4,
        &["endless.jinja", "steps for one conversation"],
    );
}
