//! Every layout of a record that is known in the field, and what each column of it becomes.

use serde_json::{Value, json};

use crate::*;

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

fn system(text: &str) -> Value {
    json!({"role": "system", "content": text})
}

#[track_caller]
fn assert_pair(record: Value, prompt: &str, chosen: &str, rejected: &str) {
    assert_eq!(shown(&read_value(record.clone())), [prompt, chosen, rejected], "{record}");
}

#[test]
fn alpaca_pairs_join_instruction_and_input_by_a_line_break() {
    let answers = ["assistant: The sum is twelve.", "assistant: The sum is eleven."];
    let record = |input: Value| json!({"instruction": "Add the numbers.", "input": input, "chosen": "The sum is twelve.", "rejected": "The sum is eleven."});
    assert_pair(record(json!("3 and 9")), "user: Add the numbers.\n3 and 9", answers[0], answers[1]);
    for empty in [json!(""), Value::Null] {
        assert_pair(record(empty), "user: Add the numbers.", answers[0], answers[1]);
    }
    let mut whole = record(json!("3 and 9"));
    whole["system"] = json!("You count.");
    whole["history"] = json!([["Hi.", "Hello."], ["Ready?", "Yes."]]);
    assert_pair(
        whole,
        "system: You count. | user: Hi. | assistant: Hello. | user: Ready? | assistant: Yes. | user: Add the numbers.\n3 and 9",
        answers[0],
        answers[1],
    );
}

#[test]
fn a_system_column_and_a_text_are_a_conversation_whatever_the_text_is_called() {
    for column in ["prompt", "instruction", "question", "query", "input", "problem", "post", "context"] {
        for system in ["system", "system_prompt", "system_message"] {
            let record = json!({system: "You label.", column: "Is it spam?", "chosen": "Answer: yes", "rejected": "Answer: no"});
            assert_pair(
                record,
                "system: You label. | user: Is it spam?",
                "assistant: Answer: yes",
                "assistant: Answer: no",
            );
        }
    }
}

#[test]
fn a_prompt_string_alone_is_plain_text_and_other_texts_are_not() {
    let record = |column: &str| json!({column: "Is it?", "chosen": " Yes", "rejected": " Yet"});
    assert_pair(record("prompt"), "\"Is it?\"", "\" Yes\"", "\" Yet\"");
    for column in ["question", "query", "instruction", "input"] {
        assert_pair(record(column), "user: Is it?", "assistant:  Yes", "assistant:  Yet");
    }
}

#[test]
fn the_system_column_stands_before_messages_in_every_format() {
    let expected =
        ["system: In French. | user: What colour is snow?", "assistant: Blanche.", "assistant: White."];
    let (ask, chosen, rejected) = (user("What colour is snow?"), assistant("Blanche."), assistant("White."));
    for record in [
        json!({"system": "In French.", "chosen": [ask, chosen], "rejected": [ask, rejected]}),
        json!({"system": "In French.", "prompt": [ask], "chosen": "Blanche.", "rejected": "White."}),
        json!({"system": "In French.", "prompt": [ask], "chosen": [chosen], "rejected": [rejected]}),
        json!({"system": "In French.", "prompt": "What colour is snow?", "chosen": [chosen], "rejected": [rejected]}),
        json!({"system": "In French.", "prompt": [system("In French."), ask], "chosen": "Blanche.", "rejected": "White."}),
        json!({"system": "In French.", "conversations": [ask], "chosen": chosen, "rejected": rejected}),
        json!({"system": "In French.", "messages": [ask, chosen], "rejected_response": "White."}),
        json!({"prompt": "What colour is snow?", "chosen": [system("In French."), chosen], "rejected": [system("In French."), rejected]}),
    ] {
        assert_pair(record, expected[0], expected[1], expected[2]);
    }
    let two =
        json!({"system": "In Dutch.", "prompt": [system("In French."), ask], "chosen": "a", "rejected": "b"});
    assert!(refusal(two).contains("column `system` (`In Dutch.`)"));
}

#[test]
fn ms_swift_has_the_chosen_response_in_its_messages() {
    let messages = json!([system("S"), user("Hi"), assistant("Hello"), user("Well?"), assistant("Fine.")]);
    let expected = "system: S | user: Hi | assistant: Hello | user: Well?";
    for rejected in [
        json!("Bad."),
        json!([assistant("Bad.")]),
        json!([system("S"), user("Hi"), assistant("Hello"), user("Well?"), assistant("Bad.")]),
    ] {
        for column in ["rejected_response", "rejected_messages"] {
            let record = json!({"messages": messages, column: rejected});
            assert_pair(record, expected, "assistant: Fine.", "assistant: Bad.");
        }
    }
    assert_pair(
        json!({"query": "Q", "response": "A", "rejected_response": "B", "history": [["q", "a"]]}),
        "user: q | assistant: a | user: Q",
        "assistant: A",
        "assistant: B",
    );
    let unanswered = json!({"messages": [user("Hi")], "rejected_response": "Bad."});
    assert!(refusal(unanswered).contains("`messages` does not end with an assistant message"));
}

#[test]
fn published_sets_are_read() {
    let (ask, good, bad) = (user("Name a metal."), assistant("Iron."), assistant("Wood."));
    for record in [
        // UltraFeedback binarized: `messages` is the chosen conversation.
        json!({"prompt": "Name a metal.", "prompt_id": "5e", "messages": [ask, good], "chosen": [ask, good], "rejected": [ask, bad], "score_chosen": 8.5}),
        // Capybara DPO: `conversation` is a list of turns.
        json!({"conversation": [{"input": "Name a metal.", "output": "Iron."}], "prompt": "Name a metal.", "chosen": [ask, good], "rejected": [ask, bad]}),
        // Argilla's UltraFeedback.
        json!({"instruction": "Name a metal.", "chosen_response": "Iron.", "rejected_response": "Wood.", "chosen_avg_rating": 4.0}),
        // Axolotl's chat_template.default, and ShareGPT with roles.
        json!({"messages": [ask], "chosen": good, "rejected": bad}),
        json!({"conversation": [ask], "chosen": [good], "rejected": [bad]}),
        // OpenAI's preference format.
        json!({"input": {"messages": [ask], "tools": [], "parallel_tool_calls": true}, "preferred_output": [good], "non_preferred_output": [bad]}),
        // Stack Exchange paired.
        json!({"question": "Name a metal.", "response_j": "Iron.", "response_k": "Wood.", "qid": 3}),
        json!({"question": "Name a metal.", "response_chosen": "Iron.", "response_rejected": "Wood."}),
        // distilabel.
        json!({"input": "Name a metal.", "chosen": "Iron.", "rejected": "Wood.", "generations": ["Iron.", "Wood."], "rating": [8, 2]}),
    ] {
        assert_pair(record, "user: Name a metal.", "assistant: Iron.", "assistant: Wood.");
    }
}

#[test]
fn sets_that_are_no_pairs_are_named() {
    for (record, words) in [
        (
            json!({"context": [user("a")], "response1": "b", "response2": "c", "overall_preference": -1}),
            "HelpSteer3",
        ),
        (
            json!({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 2}),
            "HelpSteer2",
        ),
        (
            json!({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1}),
            "PKU-SafeRLHF",
        ),
        (json!({"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1}), "SHP"),
        (json!({"prompt": "a", "answers": [{"answer": "b", "rank": 1.0}]}), "Nectar"),
        (json!({"instruction": "a", "completions": [{"response": "b"}]}), "UltraFeedback"),
        (json!({"prompt": "a", "completion": "b", "label": true}), "KTO"),
        (json!({"messages": [user("a"), assistant("b")]}), "SFT"),
        (json!({"instruction": "a", "input": "", "output": ["b", "c"]}), "output"),
    ] {
        let message = refusal(record);
        assert!(message.contains("no column `chosen`") && message.contains(words), "{message}");
    }
}

#[test]
fn two_prompts_are_one_if_one_contains_the_other_and_refused_by_name_otherwise() {
    let record = |more: Value| {
        let mut record = json!({"prompt": "Question: What?\nAnswer:", "chosen": " a", "rejected": " b"});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        record
    };
    assert_pair(record(json!({"question": "What?"})), "\"Question: What?\\nAnswer:\"", "\" a\"", "\" b\"");
    for (column, value) in [
        ("question", json!("Why?")),
        ("instruction", json!("Why?")),
        ("context", json!("Why?")),
        ("query", json!("Why?")),
        ("history", json!("Why?")),
    ] {
        let message = refusal(record(json!({column: value})));
        assert!(message.contains("`prompt`") && message.contains(&format!("`{column}`")), "{message}");
    }
    let whole = json!([user("Hi"), assistant("a")]);
    for column in ["question", "instruction", "input", "context", "query"] {
        let record = json!({"chosen": whole, "rejected": [user("Hi"), assistant("b")], column: "Not there."});
        assert!(
            refusal(record).contains(&format!("column `{column}` holds text that is not among the messages"))
        );
    }
    let lists =
        json!({"messages": [user("a")], "conversations": [user("b")], "chosen": "c", "rejected": "d"});
    assert!(refusal(lists).contains("columns `messages` and `conversations` both hold a prompt"));
}

#[test]
fn a_name_in_other_letters_is_not_passed_over() {
    for name in
        ["Prompt", "PROMPT", "prompts", "System", "Instruction", "Question", "Messages", "system-prompt"]
    {
        let value = if name == "Messages" { json!([user("a")]) } else { json!("a") };
        let message = refusal(json!({name: value, "chosen": "The a", "rejected": "The b"}));
        assert!(
            message.contains(&format!("column `{name}`")) && message.contains("did you mean"),
            "{message}"
        );
    }
    // Also where the record has a prompt without it.
    for name in ["System", "HISTORY", "Question"] {
        let message = refusal(json!({"prompt": "p", name: "a", "chosen": "The a", "rejected": "The b"}));
        assert!(message.contains(&format!("column `{name}`")), "{message}");
    }
    for name in ["promt", "user_prompt", "question_text", "chat_history", "instuction"] {
        let message = refusal(json!({name: "a", "chosen": "The a", "rejected": "The b"}));
        assert!(message.contains(&format!("column `{name}`")), "{message}");
    }
    for name in ["prompt_id", "question_id", "context_length", "margin"] {
        assert_pair(
            json!({name: "x7", "chosen": "The a", "rejected": "The b"}),
            "\"The\"",
            "\" a\"",
            "\" b\"",
        );
    }
    assert!(
        refusal(json!({"prompt": "a", "images": ["x.png"], "chosen": "b", "rejected": "c"}))
            .contains("`images`")
    );
}

#[test]
fn a_record_reads_the_same_after_any_other_and_kinds_do_not_mix() {
    let with_system = json!({"system": "S", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]});
    let without = json!({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]});
    let share_gpt = json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}});
    let records = read_values(&[without.clone(), with_system, share_gpt, without]).unwrap();
    let prompts: Vec<String> = records.iter().map(|record| shown(record)[0].clone()).collect();
    assert_eq!(prompts, ["user: q", "system: S | user: q", "user: q", "user: q"]);

    let text = json!({"prompt": "q", "chosen": "a", "rejected": "b"});
    let conversation = json!({"system": "S", "prompt": "q", "chosen": "a", "rejected": "b"});
    for (values, words) in [
        (
            [text.clone(), conversation.clone()],
            "this record is a conversation and the one at 1 is plain text",
        ),
        ([conversation, text.clone()], "this record is plain text and the one at 1 is a conversation"),
    ] {
        let error = read_values(&values).unwrap_err().to_string();
        assert!(error.contains(".jsonl:2: ") && error.contains(words), "{error}");
    }
    let asked = json!({"system": null, "prompt": "q", "chosen": "a", "rejected": "b"});
    assert_eq!(shown(&read_value(asked))[0], "user: q", "a file with a system column has conversations");
}

#[test]
fn splits_are_those_of_trl() {
    for golden in json(&file("trl_rows.json")).as_array().unwrap() {
        let record = read_value(golden["row"].clone());
        let found: [Value; 3] = match &record.body {
            mmpo_fast::data::Body::Text { prompt, chosen, rejected } => {
                [prompt, chosen, rejected].map(|text| json!(text))
            }
            mmpo_fast::data::Body::Conversation { prompt, chosen, rejected, .. } => {
                [prompt, chosen, rejected].map(|messages| json!(messages))
            }
        };
        for (part, found) in ["prompt", "chosen", "rejected"].into_iter().zip(found) {
            let mut expected = golden[part].clone();
            for message in expected.as_array_mut().into_iter().flatten() {
                // No content beside tool calls is empty content.
                message.as_object_mut().unwrap().entry("content").or_insert(json!(""));
            }
            assert_eq!(found, expected, "{part} of {}", golden["row"]);
        }
    }
}

/// The parts of a line of Markdown that stand in backticks.
fn in_backticks(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

#[test]
fn the_documented_examples_are_read_and_the_documented_roles_known() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/data.md");
    let text = std::fs::read_to_string(path).unwrap();
    let section = |title: &str| {
        let start = text.find(title).unwrap_or_else(|| panic!("no section {title}"));
        text[start..].lines().skip(2).take_while(|line| !line.starts_with('#'))
    };
    let examples: Vec<Value> = section("\n## Formats\n")
        .filter(|line| line.starts_with('|'))
        .flat_map(in_backticks)
        .filter(|code| code.starts_with('{'))
        .map(|code| serde_json::from_str(code).unwrap_or_else(|error| panic!("{code}: {error}")))
        .collect();
    assert!(examples.len() > 10, "{}", examples.len());
    for example in examples {
        let [_, chosen, rejected] = shown(&read_value(example.clone()));
        assert!(chosen != rejected, "{example}");
    }
    let rows: Vec<&str> = section("\n## Messages\n").filter(|line| line.starts_with("| `")).collect();
    assert_eq!(rows.len(), 6);
    for row in rows {
        let role = in_backticks(row).next().unwrap();
        let others = row.split('|').nth(2).unwrap().split(',').map(str::trim).filter(|name| !name.is_empty());
        for name in others.chain([role]) {
            let content = if name.ends_with("_call") { "{\"name\": \"f\"}" } else { "x" };
            let record =
                json!({"prompt": [{"role": name, "content": content}], "chosen": "a", "rejected": "b"});
            assert!(shown(&read_value(record))[0].starts_with(&format!("{role}: ")), "{name}");
        }
    }
}
