//! Renders chat templates for `tests/reference/check_templates.py`, which compares them with Jinja's.
//!
//! Each line of standard input is an object: `template` (a text), `special_tokens`, `now` (seconds since 1970), and
//! `cases`, a list of `{"messages", "variables", "add_generation_prompt"}`. Each line of standard output answers one:
//! `{"error"}` where the template does not compile, else `{"results"}`, of each case `{"text"}`, `{"raises"}` with
//! what the template raised, or `{"fails"}`. `seconds` is the time of all its renderings.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use mmpo_fast::data::ChatTemplate;
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Job {
    template: String,
    #[serde(default)]
    special_tokens: BTreeMap<String, String>,
    now: i64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Value>,
    #[serde(default)]
    variables: Map<String, Value>,
    #[serde(default)]
    add_generation_prompt: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let job: Job = serde_json::from_str(&line?)?;
        let answer = match ChatTemplate::from_source(Path::new("t"), &job.template, job.special_tokens) {
            Err(error) => json!({"error": error.to_string()}),
            Ok(template) => {
                template.fix_time(job.now)?;
                let start = Instant::now();
                let results: Vec<Value> = job.cases.iter().map(|case| render(&template, case)).collect();
                json!({"results": results, "seconds": start.elapsed().as_secs_f64()})
            }
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn render(template: &ChatTemplate, case: &Case) -> Value {
    match template.render_json(&case.messages, &case.variables, case.add_generation_prompt) {
        Ok(text) => json!({"text": text}),
        Err(refusal) if refusal.raised => json!({"raises": refusal.message}),
        Err(refusal) => json!({"fails": refusal.message}),
    }
}
