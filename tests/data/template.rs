//! Chat templates against jinja2 as transformers sets it up.

use std::path::Path;

use mmpo_fast::data::{ChatTemplate, Message};
use serde_json::{Map, Value};

use crate::*;

fn messages(case: &Value) -> Vec<Message> {
    let members = case["messages"].as_array().expect("messages").iter();
    members
        .map(|message| {
            let text = |name: &str| message[name].as_str().expect("a string").to_string();
            let mut other = message.as_object().expect("an object").clone();
            other.retain(|name, _| name != "role" && name != "content");
            Message { role: text("role"), content: text("content"), other }
        })
        .collect()
}

fn special_tokens(goldens: &Value) -> std::collections::BTreeMap<String, String> {
    serde_json::from_value(goldens["special_tokens"].clone()).expect("special tokens")
}

#[test]
fn templates_give_what_jinja_gives() {
    let goldens = json(&file("templates/goldens.json"));
    let mut compared = 0;
    for golden in goldens["goldens"].as_array().expect("goldens") {
        let name = golden["template"].as_str().expect("a name");
        let source = std::fs::read_to_string(file("templates").join(name)).expect("a committed template");
        let template = ChatTemplate::from_source(Path::new(name), &source, special_tokens(&goldens)).unwrap();
        template.fix_time(goldens["now"].as_i64().expect("a time")).unwrap();
        let case = &goldens["cases"][golden["case"].as_u64().expect("a case") as usize];
        let mut variables = Map::new();
        if let Some(tools) = case.get("tools") {
            variables.insert("tools".to_string(), tools.clone());
        }
        let messages = messages(case);
        let messages: Vec<&Message> = messages.iter().collect();
        let open = golden["add_generation_prompt"].as_bool().expect("a flag");
        let place = format!("{name}, case {}, open {open}", golden["case"]);
        match (template.render(&messages, &variables, open), golden.get("raises")) {
            (Ok(text), None) => assert_eq!(text, golden["text"].as_str().expect("a text"), "{place}"),
            (Err(refusal), Some(raises)) => {
                assert!(refusal.raised, "{place}: {refusal}");
                assert_eq!(&refusal.message, raises.as_str().expect("a message"), "{place}");
            }
            (result, _) => panic!("{place}: {result:?}, expected {golden}"),
        }
        compared += 1;
    }
    assert!(compared >= 90, "{compared} goldens");
}

#[test]
fn the_known_templates_are_what_people_write_by_hand() {
    // Written out from the models' documentation, without any template engine.
    let conversation = [Message::new("user", "Hi"), Message::new("assistant", "Hello!")];
    let special = [("bos_token", "<|begin_of_text|>"), ("eos_token", "</s>")];
    for (name, prompt, response) in [
        (
            "llama3.jinja",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Hello!<|eot_id|>",
        ),
        ("chatml.jinja", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>\n"),
        (
            "smollm2.jinja",
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "Hello!<|im_end|>\n",
        ),
        ("zephyr.jinja", "<|user|>\nHi</s>\n<|assistant|>\n", "Hello!</s>\n"),
    ] {
        let source = std::fs::read_to_string(file("templates").join(name)).unwrap();
        let special = special.map(|(name, token)| (name.to_string(), token.to_string())).into();
        let template = ChatTemplate::from_source(Path::new(name), &source, special).unwrap();
        let render = |count: usize, open| {
            let messages: Vec<&Message> = conversation.iter().take(count).collect();
            template.render(&messages, &Map::new(), open).unwrap()
        };
        assert_eq!(render(1, true), prompt, "{name}");
        assert_eq!(render(2, false), format!("{prompt}{response}"), "{name}");
    }
}

#[test]
fn now_is_asked_for_once() {
    let source = "{{ strftime_now('%Y-%m-%d') }}";
    let template = ChatTemplate::from_source(Path::new("t"), source, Default::default()).unwrap();
    assert_eq!(template.time_used(), None);
    let first = template.render(&[], &Map::new(), false).unwrap();
    let used = template.time_used().expect("a template asked");
    template.fix_time(0).unwrap();
    assert_eq!(template.time_used(), Some(used), "the first call wins");
    assert_eq!(template.render(&[], &Map::new(), false).unwrap(), first);
}

#[test]
fn a_template_that_does_not_compile_or_fails_says_where() {
    let error =
        ChatTemplate::from_source(Path::new("t.jinja"), "a\n{% if %}", Default::default()).unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("t.jinja: ") && message.contains("line 2"), "{message}");
    let template = ChatTemplate::from_source(Path::new("t"), "\n{{ x.y.z }}", Default::default()).unwrap();
    let refusal = template.render(&[], &Map::new(), false).unwrap_err();
    assert!(!refusal.raised && refusal.to_string().contains("line 2"), "{refusal}");
}

#[test]
fn a_named_list_without_a_default_is_refused_with_its_names() {
    let config = serde_json::json!({"chat_template": [{"name": "rag", "template": "x"}]});
    let folder = tempfile::tempdir().unwrap();
    let error =
        ChatTemplate::load(folder.path(), config.as_object().unwrap(), Default::default(), None).unwrap_err();
    assert!(error.to_string().contains("`default` (there are: rag)"), "{error}");
}

#[test]
fn the_template_file_wins_over_the_config_and_the_override_over_both() {
    let config = serde_json::json!({"chat_template": "config"});
    let config = config.as_object().unwrap();
    let (folder, file_path) = temporary("chat_template.jinja", "file");
    let (_other_folder, other) = temporary("other.jinja", "override");
    let text = |overriding: Option<&Path>| {
        let template = ChatTemplate::load(folder.path(), config, Default::default(), overriding).unwrap();
        template.expect("a template").render(&[], &Map::new(), false).unwrap()
    };
    assert_eq!(text(Some(&other)), "override");
    assert_eq!(text(None), "file");
    std::fs::remove_file(file_path).unwrap();
    assert_eq!(text(None), "config");
    assert!(ChatTemplate::load(folder.path(), &Map::new(), Default::default(), None).unwrap().is_none());
}
