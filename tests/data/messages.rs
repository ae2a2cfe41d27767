//! Messages in the spellings that people have: roles, parts, nulls, tool calls.

use mmpo_fast::data::{Body, Cause, TextEncoder, load_pairs};
use serde_json::{Value, json};

use crate::*;

const CASES: [&str; 3] = ["absent", "empty", "null"];

fn turns(prompt: Value) -> Value {
    json!({"prompt": prompt, "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]})
}

fn prompt_of(record: Value) -> Value {
    match read_value(record).body {
        Body::Conversation { prompt, .. } => json!(prompt),
        text => panic!("{text:?}"),
    }
}

#[test]
fn roles_are_known_by_the_names_that_people_write() {
    for (role, names) in [
        ("system", &["system", "System", "SYSTEM"][..]),
        ("developer", &["developer"]),
        ("user", &["user", "human", "Human", "USER", " user ", "prompter"]),
        ("assistant", &["assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard", "Assistant", "GPT"]),
        ("tool", &["tool", "observation", "function", "function_response", "tool_response"]),
        ("ipython", &["ipython"]),
    ] {
        for name in names {
            for (role_key, content_key) in [
                ("role", "content"),
                ("from", "value"),
                ("from", "content"),
                ("role", "value"),
                ("role", "text"),
            ] {
                let message = json!({role_key: name, content_key: "x"});
                let expected = json!([{"role": role, "content": "x"}]);
                assert_eq!(prompt_of(turns(json!([message]))), expected, "{message}");
            }
        }
    }
    assert!(refusal(turns(json!([{"role": "usr", "content": "x"}]))).contains("did you mean `user`?"));
}

#[test]
fn text_parts_are_joined_and_other_parts_are_refused_by_name() {
    for parts in [
        json!([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]),
        json!([{"type": "text", "text": "a ", "image": null}, {"text": "b", "type": null}]),
        json!(["a ", "b"]),
    ] {
        assert_eq!(prompt_of(turns(json!([{"role": "user", "content": parts}])))[0]["content"], "a b");
    }
    for kind in ["image", "image_url", "input_audio", "video"] {
        let parts = json!([{"type": "text", "text": "a"}, {"type": kind, kind: "x.png"}]);
        let message = refusal(turns(json!([{"role": "user", "content": parts}])));
        assert!(message.contains(&format!("part 2 is of type `{kind}`")), "{message}");
    }
}

#[test]
fn null_members_are_absent_at_every_depth() {
    let message = json!({"role": "assistant", "content": "x", "name": null, "tool_calls": [{"id": null, "type": "function",
        "function": {"name": "f", "arguments": {"zone": "UTC", "day": null, "list": [null, {"a": null}]}}}]});
    let expected = json!([{"role": "assistant", "content": "x", "tool_calls": [{"type": "function",
        "function": {"name": "f", "arguments": {"zone": "UTC", "list": [null, {}]}}}]}]);
    assert_eq!(prompt_of(turns(json!([message]))), expected);
    let mut record = turns(json!([{"role": "user", "content": "x"}]));
    record["tools"] = json!([{"type": "function", "function": {"name": "f", "strict": null}}]);
    record["chat_template_kwargs"] = json!({"mood": null});
    let Body::Conversation { variables, .. } = read_value(record).body else { panic!("no conversation") };
    assert_eq!(json!(variables), json!({"tools": [{"type": "function", "function": {"name": "f"}}]}));
}

#[test]
fn nulls_give_the_ids_of_messages_without_them_under_a_template_that_looks_for_members() {
    let template = file("calls_by_name.jinja");
    let encoder = TextEncoder::load(&file("llama3"), Some(&template)).unwrap();
    let clean = json!({"prompt": [{"role": "user", "content": "Name a river."}],
        "chosen": [{"role": "assistant", "content": "The Nile."}], "rejected": [{"role": "assistant", "content": "The Alps."}]});
    let mut nulls = clean.clone();
    for side in ["prompt", "chosen", "rejected"] {
        nulls[side][0]["tool_calls"] = Value::Null;
        nulls[side][0]["name"] = Value::Null;
    }
    let (_folder, path) = temporary("pairs.jsonl", format!("{clean}\n{nulls}"));
    let dataset = load_pairs(&path, &encoder, golden_limits()).unwrap();
    assert_eq!(parts(&dataset.pairs[0]), parts(&dataset.pairs[1]));
}

#[test]
fn content_beside_tool_calls_may_be_absent_null_or_empty() {
    let call = json!([{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]);
    let record = |case: &str| {
        let mut message = json!({"role": "assistant", "tool_calls": call});
        match case {
            "empty" => message["content"] = json!(""),
            "null" => message["content"] = Value::Null,
            _ => {}
        }
        turns(
            json!([{"role": "user", "content": "q"}, message, {"role": "tool", "content": "14:05", "tool_call_id": "c1"}]),
        )
    };
    let expected = prompt_of(record("empty"));
    assert_eq!(expected[1], json!({"role": "assistant", "content": "", "tool_calls": call}));
    for case in CASES {
        assert_eq!(prompt_of(record(case)), expected, "{case}");
    }
    // As a response, with the arguments as an object or as JSON text.
    for arguments in [json!({"zone": "UTC"}), json!("{\"zone\": \"UTC\"}")] {
        let call = json!([{"type": "function", "function": {"name": "clock", "arguments": arguments}}]);
        let record = json!({"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": null, "tool_calls": call}],
            "rejected": [{"role": "assistant", "content": "no"}], "tools": "[{\"name\": \"clock\", \"default\": null}]"});
        let Body::Conversation { chosen, variables, .. } = read_value(record).body else {
            panic!("no conversation")
        };
        assert_eq!(json!(chosen), json!([{"role": "assistant", "content": "", "tool_calls": call}]));
        assert_eq!(json!(variables["tools"]), json!([{"name": "clock", "default": null}]), "JSON text stays");
    }
}

#[test]
fn a_message_that_says_nothing_is_blank_as_a_response_and_refused_in_a_prompt() {
    for empty in [
        json!({"role": "assistant", "content": "", "tool_calls": null}),
        json!({"role": "assistant", "content": ""}),
        json!({"role": "assistant", "content": null}),
        json!({"role": "assistant", "content": " ", "tool_calls": []}),
    ] {
        let good = turns(json!([{"role": "user", "content": "q"}]));
        let mut record = good.clone();
        record["rejected"] = json!([empty]);
        let (_folder, path) = temporary("pairs.jsonl", format!("{good}\n{record}"));
        let dataset = load_pairs(&path, &encoder("chatml"), golden_limits()).unwrap();
        assert_eq!(dataset.report.tally(Cause::BlankResponse).first, [2], "{empty}");
    }
    for (message, words) in [
        (json!({"role": "assistant", "content": null}), "`content` is null"),
        (json!({"role": "user", "content": null, "tool_calls": null}), "`content` is null"),
        (json!({"role": "assistant"}), "without `content`"),
        (json!({"role": "assistant", "tool_calls": []}), "without `content`"),
    ] {
        let message = refusal(turns(json!([{"role": "user", "content": "q"}, message])));
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn function_calls_of_share_gpt_are_tool_calls() {
    let record = |value: &str| {
        json!({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}, {"from": "observation", "value": "r"}],
            "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}})
    };
    let prompt = prompt_of(record("{\"name\": \"clock\", \"arguments\": {\"zone\": \"UTC\"}}"));
    let call = json!([{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]);
    assert_eq!(prompt[1], json!({"role": "assistant", "content": "", "tool_calls": call}));
    assert_eq!(prompt[2], json!({"role": "tool", "content": "r"}));
    assert!(
        refusal(record("clock()")).contains("`function_call` message of column `conversations` is not JSON")
    );
}
