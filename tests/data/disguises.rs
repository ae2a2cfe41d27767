//! Files that are something else than their name says, or JSON as other programs write it: read, or named.

use std::io::Write;

use mmpo_fast::Error;
use mmpo_fast::data::read_records;

use crate::*;

const PAIR: &str = r#"{"prompt":"a","chosen":" b","rejected":" c"}"#;

#[track_caller]
fn assert_read(bytes: impl AsRef<[u8]>, places: &[usize]) {
    for name in ["p.jsonl", "p.json", "p.txt"] {
        let (_folder, path) = temporary(name, &bytes);
        let records = read_records(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found: Vec<usize> = records.iter().map(|record| record.place).collect();
        assert_eq!(found, places, "{name}");
        assert!(records.iter().all(|record| record.body == records[0].body), "{name}");
    }
}

/// The file is refused with exit code 3, at this line, in these words; and the advice has some too.
#[track_caller]
fn assert_named(bytes: impl AsRef<[u8]>, at: Option<usize>, words: &[&str], advice: &str) {
    let (_folder, path) = temporary("pairs.jsonl", bytes);
    let error = read_records(&path).unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    let Error::Data { line, message, help, .. } = &error else { panic!("{error:?}") };
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
    assert!(help.contains(advice), "{advice:?} is not in {help:?}");
    assert_eq!(*line, at, "{message}");
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn json_is_told_by_its_bytes_whatever_the_name_says() {
    assert_read(format!("{PAIR}\n{PAIR}\n"), &[1, 2]);
    assert_read(format!("{PAIR}\n{PAIR}"), &[1, 2]);
    assert_read(format!("[{PAIR},\n{PAIR}]"), &[1, 2]);
    assert_read(PAIR, &[1]);
    let pretty = PAIR.replace(',', ",\n  ").replace('{', "{\n  ").replace('}', "\n}");
    assert_read(&pretty, &[1]);
    assert_read(format!("{pretty}\n{pretty}\n"), &[1, 2]);
    for key in ["data", "train", "rows", "examples"] {
        assert_read(format!("{{\"version\": 1.0, \"{key}\": [{PAIR}, {PAIR}]}}"), &[1, 2]);
        assert_read(format!("{{\n\"{key}\": [\n{PAIR},\n{PAIR}\n]\n}}\n"), &[1, 2]);
    }
    let columns = r#"{"prompt":["a","a"],"chosen":[" b"," b"],"rejected":[" c"," c"]}"#;
    assert_read(columns, &[1, 2]);
    let pandas =
        r#"{"prompt":{"0":"a","1":"a"},"chosen":{"0":" b","1":" b"},"rejected":{"0":" c","1":" c"}}"#;
    assert_read(pandas, &[1, 2]);
    let shifted = pandas.replace(r#""rejected":{"0""#, r#""rejected":{"7""#);
    assert_named(shifted, None, &["the rows of column `rejected` have other names"], "records");
}

#[test]
fn line_ends_and_marks_of_all_systems_are_read() {
    assert_read(format!("{PAIR}\r{PAIR}\r"), &[1, 2]);
    assert_read(format!("\u{feff}{PAIR}\r\n{PAIR}\r\n"), &[1, 2]);
    assert_read(format!("\u{feff}{PAIR}\n\n\u{feff}{PAIR}\n"), &[1, 3]);
    assert_read(format!("\r\n\r\n{PAIR}\r\n\r\n{PAIR}"), &[3, 5]);
    assert_read(format!("\u{feff}[\r{PAIR},\r{PAIR}\r]"), &[1, 2]);
}

#[test]
fn gzip_may_have_members_and_padding_and_must_be_whole() {
    let one = gzip(&format!("{PAIR}\n"));
    assert_read([one.clone(), one.clone()].concat(), &[1, 2]);
    assert_read([one.clone(), vec![0; 70_000]].concat(), &[1]);
    assert_read([one.clone(), vec![0; 512], one.clone(), vec![0; 3]].concat(), &[1, 2]);
    assert_named(&one[..one.len() - 9], None, &["gzip", "cut short"], "gzip -t");
    assert_named([one.as_slice(), b"text"].concat(), None, &["gzip", "neither gzip nor zeros"], "gzip -t");
    assert_read(gzip("prompt,chosen,rejected\na, b, c\n"), &[2]);
    assert_named(gzip("PAR1xxxx"), None, &["under gzip, this is a Parquet table"], "gunzip");
}

#[test]
fn files_of_other_kinds_are_named_with_what_to_do() {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    for (bytes, words, advice) in [
        (
            &b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"[..],
            "git-lfs pointer",
            "git lfs pull",
        ),
        (b"GGUF\x03\x00\x00\x00", "GGUF", "--model"),
        (b"\x28\xb5\x2f\xfd\x24", "Zstandard", "unzstd"),
        (b"BZh91AY", "bzip2", "bunzip2"),
        (b"\xfd7zXZ\x00\x00", "xz file", "unxz"),
        (b"PK\x03\x04\x14", "ZIP archive", "unzip"),
        (b"ARROW1\x00\x00", "Arrow", "to_parquet"),
        (b"<!DOCTYPE html><html>", "web page", "download"),
        (b"\xff\xfe{\x00\"\x00", "UTF-16", "iconv -f UTF-16"),
        (&utf16(PAIR), "UTF-16", "iconv -f UTF-16"),
        (b"\xff\xfe\x00\x00{\x00\x00\x00", "UTF-32", "iconv -f UTF-32"),
    ] {
        assert_named(bytes, None, &[words, "not JSON"], advice);
    }
    assert_named(b"PAR1\x15\x04", None, &["the Parquet table cannot be read"], "again");
    assert_named("id,\"Prompt\",chosen\n1,a,b\n", Some(2), &["no column `rejected`"], "chosen");
    assert_named(
        "some words\nand more\n",
        Some(1),
        &["nor the names of columns", "some words"],
        "prompt,chosen",
    );
    assert_named("\n// pairs\n{}", Some(2), &["comment"], "comments");
    assert_named(b"\x01\x02\x00\x03", Some(1), &["binary data"], "chosen");
}

#[test]
fn tables_are_told_by_the_names_in_their_first_line() {
    for separator in [",", "\t", ";"] {
        let table = "id,prompt,chosen,rejected\n1,a, b, c\n\n2,a, b, c".replace(',', separator);
        assert_read(&table, &[2, 4]);
        assert_read(format!("\u{feff}{}", table.replace('\n', "\r\n")), &[2, 4]);
        assert_read(table.replace("prompt", "\"prompt\"").replace("2", "\"2\""), &[2, 4]);
    }
    assert_read("prompt,chosen,rejected,note\na, b, c,\"two\nlines\"\na, b, c,\"a \"\"word\"\"\"\n", &[2, 4]);
}

#[test]
fn text_that_is_not_utf8_is_named_with_its_byte_and_line() {
    let line = |bytes: &[u8]| [PAIR.as_bytes(), b"\n{\"prompt\":\"", bytes, b"\"}\n"].concat();
    let at = format!("at byte {} of the file", PAIR.len() + 12);
    // "天气" in GBK, and "é" in Latin-1.
    assert_named(line(b"\xcc\xec\xc6\xf8"), Some(2), &["not UTF-8", "0xcc", &at], "iconv -f GBK");
    assert_named(line(b"\xe9t\xe9"), Some(2), &["not UTF-8", "0xe9", &at], "iconv -f LATIN1");
    let list = [b"[\n{\"prompt\":\"", &b"\xcc\xec"[..], b"\"}]"].concat();
    assert_named(list, Some(2), &["not UTF-8", "at byte 13 of the file"], "GBK");
}

#[test]
fn numbers_that_json_lacks_pass_where_nobody_reads_them() {
    for value in [
        "NaN",
        "Infinity",
        "-Infinity",
        "[1, {\"a\": NaN}]",
        "1e999",
        "123456789012345678901234567890",
        "\"\\ud83d\"",
    ] {
        assert_read(PAIR.replace('}', &format!(",\"score\":{value}}}")), &[1]);
        assert_read(format!("[{}]", PAIR.replace('}', &format!(",\"score\":{value}}}"))), &[1]);
    }
    let used = |column: &str, value: &str| PAIR.replace('}', &format!(",\"{column}\":{value}}}"));
    assert_named(used("input", "NaN"), Some(1), &["column `input` holds NaN"], "null");
    assert_named(used("tools", "[{\"a\": -Infinity}]"), Some(1), &["column `tools` holds -Infinity"], "null");
    assert_named(
        used("tools", "[{\"a\": 1e999}]"),
        Some(1),
        &["column `tools`", "number out of range"],
        "64 bits",
    );
    assert_named(
        used("system", "\"a\\udc00\""),
        Some(1),
        &["column `system` holds `\\udc00`", "surrogate"],
        "emoji",
    );
    let paired = PAIR.replace(" b", " \\ud83d\\ude00");
    assert_read(paired, &[1]);
}

#[test]
fn broken_json_is_named_in_the_words_of_its_author() {
    for (line, words) in [
        (PAIR.replace('"', "'"), "a single quote begins a key"),
        (PAIR.replace("\"a\"", "None"), "`None` is Python"),
        (PAIR.replace("\"a\"", "True"), "`True` is Python"),
        (PAIR.replace('}', ",}"), "trailing comma"),
        (format!("{PAIR},"), "a comma follows the value"),
        (format!("{PAIR}{PAIR}"), "a second value follows"),
        (PAIR.replace(",\"r", ", // x\"r"), "a comment begins here"),
        (PAIR.replace("\"a\"", "\"a\tb\""), "control character 0x09"),
        (PAIR.replace("\"a\"", "\"a\\x\""), "no escape"),
        (PAIR.replace("\"a\"", "01"), "`01` is no number"),
        (format!("{PAIR}]"), "trailing text"),
    ] {
        assert_named(
            format!("{PAIR}\n{line}\n"),
            Some(2),
            &["broken JSON", words, "at column"],
            "JSON Lines",
        );
        if !line.ends_with(',') && !line.ends_with(']') && !line.ends_with(&PAIR.repeat(2)) {
            assert_named(
                format!("[{PAIR},\n\n{line}\n]"),
                Some(3),
                &["broken JSON", words, "record 2"],
                "line",
            );
        }
    }
    assert_named(
        format!("{PAIR}\n {}", PAIR.replace('}', ",}")),
        Some(2),
        &["trailing comma at column 46"],
        "JSON Lines",
    );
    assert_named(format!("[{PAIR},\n{PAIR},\n]"), Some(3), &["trailing comma", "record 3"], "line");
    assert_named(format!("{PAIR}\n{}", &PAIR[..20]), Some(2), &["EOF"], "JSON Lines");
    assert_named(format!("[{PAIR},\n{}", &PAIR[..20]), Some(2), &["EOF", "record 2"], "line");
}

#[test]
fn depth_and_length_are_bounded_with_one_clear_error() {
    let deep = "[".repeat(100_000);
    for text in [
        PAIR.replace('}', &format!(",\"e\":{deep}")),
        PAIR.replace("\"a\"", &deep),
        PAIR.replace("\"a\"", &"{\"a\":".repeat(100_000)),
    ] {
        assert_named(format!("{PAIR}\n{text}\n"), Some(2), &["nested more than 1000 deep"], "JSON Lines");
    }
    assert_named(&deep, Some(1), &["nested more than 1000 deep"], "line");
    let tools = format!("[{}{}]", "[".repeat(500), "]".repeat(500));
    assert_named(
        PAIR.replace('}', &format!(",\"tools\":{tools}}}")),
        Some(1),
        &["column `tools`", "recursion"],
        "deep",
    );

    let junk = |bytes: usize| PAIR.replace('}', &format!(",\"e\":[{}0]}}", "0,".repeat(bytes / 2)));
    assert_read(junk(1 << 20), &[1]);
    for wrap in [|line: String| format!("{PAIR}\n{line}\n"), |line: String| format!("[{PAIR},\n{line}]")] {
        let text = wrap(junk(33 << 20));
        let (_folder, path) = temporary("pairs.jsonl", text);
        let error = read_records(&path).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(
            error.to_string().contains(":2: this record") && error.to_string().contains("longer than 32 MiB"),
            "{error}"
        );
    }
    let columns: String = (0..20_000).map(|n| format!(",\"c{n}\":{n}")).collect();
    assert_named(PAIR.replace('}', &format!("{columns}}}")), Some(1), &["more than 10000 columns"], "chosen");
    assert_read(PAIR.replace(" b", &"word ".repeat(1 << 20)), &[1]);
}

#[test]
fn records_of_a_list_are_named_by_their_number_and_line() {
    let list = format!("[\n{PAIR},\n{PAIR},\n{{\"prompt\":\"a\",\"chosen\":1,\"rejected\":\"c\"}}]");
    assert_named(list, Some(3), &["`chosen` is a number", "record 3, which begins in line 4"], "chosen");
}
