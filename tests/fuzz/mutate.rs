//! Seeded changes to valid input: of bytes, of text, and of JSON's structure.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// Texts that readers have stumbled over somewhere: numbers at the edges of types, brackets, escapes, words of formats.
const FRAGMENTS: [&str; 48] = [
    "0",
    "-1",
    "1e309",
    "-0.0",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775808",
    "4294967296",
    "2147483648",
    "1e-320",
    "NaN",
    "Infinity",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "[[",
    "}}",
    "{{",
    "{%",
    "%}",
    "{#",
    "\\u0000",
    "\\ud800",
    "\u{feff}",
    "\u{0}",
    "\u{1b}[2J",
    "\u{202e}",
    "\n",
    "\r\n",
    "\t",
    ",",
    ":",
    "\"",
    "\\",
    "../..",
    "/dev/zero",
    "builtin:demo",
    "| tojson",
    "| length",
    "messages",
    "for x in range(99999)",
    "loop.index",
    "eos_token",
    "\"type\"",
    "\"content\"",
    "(((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((",
];

/// The input number `index` of `seed`: one of `seeds` with a few changes. Equal arguments give equal bytes.
pub fn input(format: &str, seeds: &[Vec<u8>], seed: u64, index: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format.as_bytes()).update(&seed.to_le_bytes()).update(&index.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    let mut bytes = pick(&mut random, seeds).clone();
    for _ in 0..random.random_range(1..=4) {
        change(&mut random, &mut bytes, seeds);
    }
    bytes
}

fn pick<'a, T>(random: &mut impl Rng, of: &'a [T]) -> &'a T {
    &of[random.random_range(0..of.len())]
}

/// A range of up to `most` bytes.
fn range(random: &mut impl Rng, len: usize, most: usize) -> std::ops::Range<usize> {
    let start = random.random_range(0..=len);
    let size = random.random_range(0..=most.min(len - start));
    start..start + size
}

fn change(random: &mut impl Rng, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let len = bytes.len();
    match random.random_range(0..14) {
        0 if len > 0 => bytes[random.random_range(0..len)] ^= 1 << random.random_range(0..8),
        1 if len > 0 => bytes[random.random_range(0..len)] = random.random(),
        2 => bytes.truncate(random.random_range(0..=len)),
        3 => {
            let range = range(random, len, 64);
            bytes.drain(range);
        }
        4 => {
            let (range, at) = (range(random, len, 256), random.random_range(0..=len));
            let copy = bytes[range].repeat(random.random_range(1..=4));
            bytes.splice(at..at, copy);
        }
        5 => {
            let other = pick(random, seeds);
            let (from, to) = (range(random, other.len(), 256), range(random, len, 256));
            bytes.splice(to, other[from].iter().copied());
        }
        6 => edit_number(random, bytes),
        7 => {
            let (range, depth) = (range(random, len, 32), random.random_range(1..=400));
            let (open, close) =
                *pick(random, &[("[", "]"), ("{\"a\":", "}"), ("(", ")"), ("not ", ""), ("a.", "")]);
            let inner = String::from_utf8_lossy(&bytes[range.clone()]).into_owned();
            bytes.splice(range, (open.repeat(depth) + &inner + &close.repeat(depth)).into_bytes());
        }
        8..=10 => edit_json(random, bytes),
        _ => {
            let range = range(random, len, 16);
            let text = pick(random, &FRAGMENTS).as_bytes().to_vec();
            bytes.splice(range, text);
        }
    }
}

/// Puts another number where one stands.
fn edit_number(random: &mut impl Rng, bytes: &mut Vec<u8>) {
    let starts: Vec<usize> = (0..bytes.len())
        .filter(|&at| bytes[at].is_ascii_digit() && (at == 0 || !bytes[at - 1].is_ascii_digit()))
        .collect();
    if starts.is_empty() {
        return;
    }
    let start = *pick(random, &starts);
    let end = start + bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    bytes.splice(start..end, pick(random, &FRAGMENTS[..10]).bytes());
}

/// Changes a member somewhere in a JSON text, or in one line of JSON Lines.
fn edit_json(random: &mut impl Rng, bytes: &mut Vec<u8>) {
    if let Ok(mut value) = serde_json::from_slice::<Value>(bytes) {
        edit_value(random, &mut value);
        *bytes = value.to_string().into_bytes();
        return;
    }
    let mut lines: Vec<Vec<u8>> = bytes.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
    let at = random.random_range(0..lines.len());
    if let Ok(mut value) = serde_json::from_slice::<Value>(&lines[at]) {
        edit_value(random, &mut value);
        lines[at] = value.to_string().into_bytes();
        *bytes = lines.join(&b'\n');
    }
}

fn edit_value(random: &mut impl Rng, value: &mut Value) {
    // Deeper with each step down, so that all depths are met.
    let inner = match value {
        Value::Array(values) if !values.is_empty() => {
            let at = random.random_range(0..values.len());
            values.get_mut(at)
        }
        Value::Object(members) if !members.is_empty() => {
            let at = random.random_range(0..members.len());
            members.values_mut().nth(at)
        }
        _ => None,
    };
    match inner {
        Some(inner) if random.random_range(0..4) > 0 => edit_value(random, inner),
        _ => edit_here(random, value),
    }
}

fn edit_here(random: &mut impl Rng, value: &mut Value) {
    let new = strange(random);
    match value {
        Value::Object(members) if !members.is_empty() && random.random_bool(0.8) => {
            let at = random.random_range(0..members.len());
            let key = members.keys().nth(at).cloned().unwrap_or_default();
            match random.random_range(0..4) {
                0 => _ = members.remove(&key),
                1 => _ = members.insert((*pick(random, &FRAGMENTS)).to_string(), new),
                2 => {
                    let moved = members.remove(&key).unwrap_or_default();
                    members.insert(key + "_", moved);
                }
                _ => _ = members.insert(key, new),
            }
        }
        Value::Array(values) if !values.is_empty() && random.random_bool(0.8) => {
            let at = random.random_range(0..values.len());
            match random.random_range(0..4) {
                0 => _ = values.remove(at),
                1 => values.insert(at, new),
                2 => values.push(values[at].clone()),
                _ => values[at] = new,
            }
        }
        other => *other = new,
    }
}

fn strange(random: &mut impl Rng) -> Value {
    match random.random_range(0..16) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(-1),
        3 => json!(u64::MAX),
        4 => json!(1e308),
        5 => json!(0.5),
        6 => json!([]),
        7 => Value::Object(Map::new()),
        8 => json!("x".repeat(random.random_range(1..5000))),
        9 => (0..random.random_range(1..120)).fold(Value::Null, |inner, _| json!([inner])),
        10 => (0..random.random_range(1..120)).fold(Value::Null, |inner, _| json!({ "type": inner })),
        11 => json!("\u{0}\u{1b}\u{202e}\u{fffd}"),
        12 => json!([null, "", 0, {}]),
        13 => json!(random.random::<u32>()),
        14 => json!(0),
        _ => json!(*pick(random, &FRAGMENTS)),
    }
}
