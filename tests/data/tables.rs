//! Pairs out of Parquet and CSV tables, which pyarrow, datasets and pandas wrote (`tests/reference/make_tables.py`).

use mmpo_fast::config::ColumnNames;
use mmpo_fast::data::{Body, load_pairs, read_records, read_records_as};

use crate::*;

/// The same pairs as JSON Lines.
fn as_lines(table: &str) -> PathBuf {
    let lines = format!("{}.jsonl", table.split('.').next().unwrap());
    let own = file("tables").join(&lines);
    match own.exists() {
        true => own,
        false => file("pairs").join(lines),
    }
}

#[test]
fn tables_give_the_tokens_of_the_same_pairs_as_json() {
    for table in [
        "ultrafeedback.parquet",
        "orca.parquet",
        "text.parquet",
        "conversational.parquet",
        "conversational.delta.parquet",
        "text.delta.parquet",
        "orca.csv",
        "text.csv",
        "conversational.tsv",
    ] {
        for tokenizer in ["chatml", "llama3"] {
            let encoder = encoder(tokenizer);
            let lines = load_pairs(&as_lines(table), &encoder, golden_limits()).expect(table);
            let found = load_pairs(&file("tables").join(table), &encoder, golden_limits())
                .unwrap_or_else(|error| panic!("{table}: {error}"));
            assert!(!found.pairs.is_empty(), "{table}");
            assert_eq!(all_parts(&found), all_parts(&lines), "{table} with {tokenizer}");
            assert_eq!(found.fingerprint, lines.fingerprint, "{table}");
            assert_eq!(found.report.records, lines.report.records, "{table}");
        }
    }
}

#[test]
fn nested_rows_are_the_records_of_their_json() {
    for table in ["ultrafeedback.parquet", "conversational.parquet", "conversational.tsv"] {
        let records =
            read_records(&file("tables").join(table)).unwrap_or_else(|error| panic!("{table}: {error}"));
        let lines = read_records(&as_lines(table)).expect(table);
        let bodies = |records: &[mmpo_fast::data::Record]| -> Vec<Body> {
            records.iter().map(|record| record.body.clone()).collect()
        };
        assert_eq!(bodies(&records), bodies(&lines), "{table}");
        let places: Vec<usize> = records.iter().map(|record| record.place).collect();
        let first = if table.ends_with("tsv") { 2 } else { 1 };
        assert_eq!(places[0], first, "{table}: rows of Parquet, lines of a text file");
    }
}

#[test]
fn a_parquet_table_that_is_damaged_is_an_error_and_no_panic() {
    for table in ["ultrafeedback.parquet", "orca.parquet", "text.parquet"] {
        let whole = std::fs::read(file("tables").join(table)).unwrap();
        let step = (whole.len() / 60).max(1);
        let mut refused = 0;
        for cut in (4..whole.len()).step_by(step) {
            // Cut short, and with one byte changed.
            let (_folder, path) = temporary("p.parquet", &whole[..cut]);
            let error = read_records(&path).expect_err("a table without its end");
            assert_eq!(error.exit_code(), 3, "{error}");
            let mut changed = whole.clone();
            changed[cut] ^= 0x55;
            let (_folder, path) = temporary("p.parquet", &changed);
            match read_records(&path) {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.exit_code(), 3, "{error}");
                    refused += 1;
                }
            }
        }
        assert!(refused > 0, "{table}: no change of a byte was noticed");
    }
}

#[test]
fn a_page_that_claims_more_than_it_holds_is_refused_before_room_is_made_for_it() {
    // Found by fuzzing: 9.4 KB, for which 2.1 GB were set aside.
    let error = read_records(&file("hostile/two-gigabytes.parquet")).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("a dictionary claims") && message.contains("bytes hold"), "{message}");
    assert_eq!(error.exit_code(), 3);
}

/// Bytes in a column that nothing reads (`digest`) are passed over; those of a response are never replaced by other words.
#[test]
fn bytes_of_a_response_that_are_no_text_are_refused_by_column_and_row() {
    let error = read_records(&file("tables/latin.parquet")).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("latin.parquet:2: column `chosen` holds bytes that are no UTF-8 text"),
        "{message}"
    );
    assert_eq!(error.exit_code(), 3);
}

#[test]
fn what_is_wrong_in_a_table_is_named_with_its_row() {
    let named = |name: &str, text: &str, line: usize, words: &str| {
        let (_folder, path) = temporary(name, text);
        match read_records(&path).unwrap_err() {
            mmpo_fast::Error::Data { line: Some(found), message, help, .. } => {
                assert_eq!(found, line, "{message}");
                assert!(message.contains(words), "{message}");
                assert!(!help.is_empty());
            }
            other => panic!("{other:?}"),
        }
    };
    named("p.csv", "prompt,chosen\na,b\n", 2, "no column `rejected`");
    named(
        "p.csv",
        "prompt,chosen,rejected\na,b,c\n\na,b\n",
        4,
        "a row of 2 columns, and the first line names 3",
    );
    named("p.csv", "one\na\n", 2, "no column `chosen`");
    named("p.csv", "prompt,chosen,rejected\n\"a,b,c\na,b,c\n", 2, "a row of 1 columns");
    let long = format!("prompt,chosen,rejected\na,b,\"{}", "x".repeat(33 << 20));
    named("p.csv", &long, 2, "longer than 32 MiB");
    let path = file("tables/orca.parquet");
    let columns = ColumnNames(vec![("chosen".into(), "id".into())]);
    let error = read_records_as(&path, &columns).unwrap_err().to_string();
    assert!(error.contains("orca.parquet:1: no column `id`") && error.contains("(row 1)"), "{error}");
}

#[test]
fn text_that_is_json_stays_text_unless_it_is_messages() {
    let table = "prompt,chosen,rejected\nWrite JSON.,\"{\"\"a\"\": [1]}\",\"[{\"\"a\"\": 1}]\"\n";
    let (_folder, path) = temporary("p.csv", table);
    let records = read_records(&path).unwrap();
    assert_eq!(shown(&records[0]), [r#""Write JSON.""#, r#""{\"a\": [1]}""#, r#""[{\"a\": 1}]""#]);
}

#[test]
fn columns_are_read_under_the_names_that_they_are_given() {
    let columns = ColumnNames(vec![
        ("prompt".into(), "question".into()),
        ("chosen".into(), "answer_good".into()),
        ("rejected".into(), "answer_bad".into()),
    ]);
    let renamed = |text: &str| {
        let text = text.replace("\"prompt\"", "\"question\"").replace("\"chosen\"", "\"answer_good\"");
        text.replace("\"rejected\"", "\"answer_bad\"")
    };
    for name in ["conversational", "text"] {
        let text = std::fs::read_to_string(file("pairs").join(format!("{name}.jsonl"))).unwrap();
        let (_folder, path) = temporary("pairs.jsonl", renamed(&text));
        let plain = read_records(&file("pairs").join(format!("{name}.jsonl"))).unwrap();
        assert_eq!(read_records_as(&path, &columns).unwrap(), plain, "{name}");
        let error = read_records(&path).unwrap_err().to_string();
        assert!(error.contains("no column `chosen`"), "{error}");
    }
    let csv = "question,answer_good,answer_bad,prompt\na, b, c,not this\n";
    let (_folder, path) = temporary("pairs.csv", csv);
    let records = read_records_as(&path, &columns).unwrap();
    assert_eq!(
        shown(&records[0]),
        [r#""a""#, r#"" b""#, r#"" c""#],
        "the file's own `prompt` is passed over"
    );

    let line = r#"{"question":"a","answer_good":" b","answer_bad":" c"}"#;
    let (_folder, path) = temporary("pairs.jsonl", line);
    let mut more = columns.clone();
    more.0.push(("system".into(), "sytem_text".into()));
    let error = read_records_as(&path, &more).unwrap_err().to_string();
    assert!(
        error.contains("no record has a column `sytem_text`, which `--columns` reads as `system`"),
        "{error}"
    );
}
