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

/// transformers formats `datetime.now()`, which has no time zone.
#[test]
fn dates_are_written_as_pythons_strftime_writes_them() {
    let source = "{{ strftime_now('%Y%%f|%f|%z%Z|%-d \u{e9}') }}";
    let template = ChatTemplate::from_source(Path::new("t"), source, Default::default()).unwrap();
    // Noon in the middle of a month, which is the same day in every time zone but those of 12 hours and more.
    template.fix_time(1_718_452_800).unwrap();
    assert_eq!(template.render(&[], &Map::new(), false).unwrap(), "2024%f|000000||15 \u{e9}");
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

fn load(folder: &Path, config: &str, chosen: Option<&str>) -> mmpo_fast::Result<Option<ChatTemplate>> {
    let config: Map<String, Value> = serde_json::from_str(config).unwrap();
    ChatTemplate::load(folder, &config, Default::default(), chosen.map(Path::new))
}

/// What the template of a folder writes, with tools if `tools`.
fn written(folder: &Path, config: &str, chosen: Option<&str>, tools: bool) -> String {
    let template = load(folder, config, chosen).unwrap().expect("a template");
    let mut variables = Map::new();
    if tools {
        variables.insert("tools".to_string(), serde_json::json!([{"name": "f"}]));
    }
    template.render(&[], &variables, false).unwrap()
}

fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

const ADDITIONAL: [(&str, &str); 3] = [
    ("additional_chat_templates/tool_use.jinja", "file tools"),
    ("additional_chat_templates/rag.jinja", "file rag"),
    ("additional_chat_templates/notes.txt", "no template"),
];
const LIST: &str = r#"{"chat_template": [{"name": "default", "template": "list default"},
    {"name": "tool_use", "template": "list tools"}, {"name": "rag", "template": "list rag"}]}"#;

#[test]
fn named_templates_are_read_in_every_form_and_tools_pick_theirs() {
    // Expected texts: what transformers 5.23 loads and picks for the same folders.
    let files = folder_with(&[&[("chat_template.jinja", "file default")][..], &ADDITIONAL].concat());
    let list = folder_with(&[]);
    let object =
        r#"{"chat_template": {"default": "list default", "tool_use": "list tools", "rag": "list rag"}}"#;
    for (folder, config, form) in [(&files, LIST, "file"), (&list, LIST, "list"), (&list, object, "list")] {
        let written = |chosen, tools| written(folder.path(), config, chosen, tools);
        assert_eq!(written(None, false), format!("{form} default"));
        assert_eq!(written(None, true), format!("{form} tools"));
        assert_eq!(written(Some("rag"), true), format!("{form} rag"));
        assert_eq!(written(Some("default"), true), format!("{form} default"));
    }
    // Files take the place of the config's templates even where none of them is the default.
    let additional = folder_with(&ADDITIONAL);
    let error = load(additional.path(), LIST, None).unwrap_err();
    assert!(error.to_string().contains("`default` (there are: rag, tool_use)"), "{error}");
    let legacy = folder_with(&[("chat_template.json", r#"{"chat_template": "legacy"}"#)]);
    assert_eq!(written(legacy.path(), "{}", None, false), "legacy");
    assert_eq!(written(legacy.path(), r#"{"chat_template": "config"}"#, None, false), "config");
}

#[test]
fn a_choice_that_names_no_template_or_two_is_refused_with_the_names() {
    let folder = folder_with(&[]);
    let error = load(folder.path(), LIST, Some("toolz")).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("has default, rag, tool_use"), "{error}");
    let error = load(folder.path(), "{}", Some("rag")).unwrap_err();
    assert!(error.to_string().contains("has no templates"), "{error}");
    // The tests run in the folder of the manifest, where this file lies.
    let both = r#"{"chat_template": {"default": "a", "Cargo.toml": "b"}}"#;
    let error = load(folder.path(), both, Some("Cargo.toml")).unwrap_err();
    assert!(error.to_string().contains("and a file as well"), "{error}");
    let error = load(folder.path(), LIST, Some("tests")).unwrap_err();
    assert!(error.to_string().contains("is a folder"), "{error}");
}

#[test]
fn a_pointer_or_bytes_in_the_place_of_a_template_are_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    let folder = folder_with(&[("chat_template.jinja", pointer)]);
    let error = load(folder.path(), "{}", None).unwrap_err();
    assert!(error.to_string().contains("git-lfs pointer") && error.exit_code() == 4, "{error}");
    std::fs::write(folder.path().join("chat_template.jinja"), b"a\xff").unwrap();
    let error = load(folder.path(), "{}", None).unwrap_err();
    assert!(error.to_string().contains("byte 1"), "{error}");
}

#[test]
fn the_token_that_ends_a_turn_is_what_the_template_writes_after_the_answer() {
    for (tokenizer, source, expected) in [
        (
            "chatml",
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            "<|im_end|>",
        ),
        // Nothing special is written: a response then ends with the tokenizer's own end token.
        ("chatml", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<|im_end|>"),
        ("chatml", "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", "<|endoftext|>"),
        // The first of two counts.
        (
            "chatml",
            "{% for m in messages %}{{ m.content }}<|im_end|><|endoftext|>{% endfor %}<|im_start|>",
            "<|im_end|>",
        ),
        // This one takes no conversation without a system message.
        (
            "llama3",
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
            "<|eot_id|>",
        ),
    ] {
        let encoder = encoder(tokenizer);
        let template = ChatTemplate::from_source(Path::new("t"), source, Default::default()).unwrap();
        let end = template.end_of_turn(&encoder.tokenizer).unwrap();
        assert_eq!(end, encoder.tokenizer.token_id(expected), "{tokenizer}: {source}");
    }
}

#[test]
fn a_template_that_asks_for_too_much_is_at_fault_and_not_the_conversation() {
    for source in
        ["{{ range(10**9) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 'x' * 10**9 }}"]
    {
        let template = ChatTemplate::from_source(Path::new("t"), source, Default::default()).unwrap();
        let refusal = template.render(&[], &Map::new(), false).unwrap_err();
        assert!(refusal.exceeded && refusal.message.contains("line 1"), "{source}: {refusal}");
        let turn = |role: &str| serde_json::json!([{"role": role, "content": "x"}]);
        let record = serde_json::json!({"prompt": turn("user"), "chosen": turn("assistant"), "rejected": turn("assistant")});
        let (_folder, path) = temporary("pairs.jsonl", record.to_string());
        let encoder =
            mmpo_fast::data::TextEncoder { tokenizer: encoder("chatml").tokenizer, template: Some(template) };
        let error = mmpo_fast::data::load_pairs(&path, &encoder, golden_limits()).map(|_| ()).unwrap_err();
        assert_eq!(error.exit_code(), 4, "{error}");
    }
}

/// Words of the template itself cost one step each, however long they are.
#[test]
fn the_text_of_a_conversation_is_bounded_by_the_conversation() {
    let render = |source: &str, content: &str| {
        let template = ChatTemplate::from_source(Path::new("t"), source, Default::default()).unwrap();
        let messages = [Message::new("user", content), Message::new("assistant", content)];
        template.render(&messages.each_ref(), &Map::new(), false)
    };
    // Found by fuzzing: it would have written 500 MB within its steps.
    let found = std::fs::read_to_string(file("hostile/gigabytes.jinja")).unwrap();
    let loops = format!(
        "{{% for a in range(2000) %}}{{% for b in range(100) %}}{}{{% endfor %}}{{% endfor %}}",
        "x".repeat(900)
    );
    for source in [&found, &loops] {
        let refusal = render(source, "a few words").unwrap_err();
        assert!(refusal.exceeded, "{refusal}");
        assert!(
            refusal.to_string().contains("makes more than 2 MiB of text out of one conversation"),
            "{refusal}"
        );
    }
    // What is long because the conversation is long is no fault.
    let long = "a long story ".repeat(100_000);
    let repeated =
        |times: usize| format!("{{% for m in messages %}}{}{{% endfor %}}", "{{ m.content }}".repeat(times));
    assert_eq!(render(&repeated(16), &long).unwrap().len(), 2 * 16 * long.len());
    assert!(render(&repeated(17), &long).unwrap_err().exceeded);
}

#[test]
fn long_conversations_stay_far_below_the_limits() {
    let text = "All work and no play makes a long text. ".repeat(13);
    let conversation: Vec<Message> =
        (0..200).map(|turn| Message::new(if turn % 2 == 0 { "user" } else { "assistant" }, &text)).collect();
    let messages: Vec<&Message> = conversation.iter().collect();
    for name in ["llama3.jinja", "chatml.jinja", "smollm2.jinja", "zephyr.jinja", "tools.jinja"] {
        let source = std::fs::read_to_string(file("templates").join(name)).unwrap();
        // A tenth of the limit must do: the same conversation ten times over.
        let source = format!("{{% for repeated in range(10) %}}{source}{{% endfor %}}");
        let special = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let special = special.map(|(name, token)| (name.to_string(), token.to_string())).into();
        let template = ChatTemplate::from_source(Path::new(name), &source, special).unwrap();
        let rendered =
            template.render(&messages, &Map::new(), false).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(rendered.len() >= 10 * 100_000, "{name}: {} bytes", rendered.len());
    }
}
