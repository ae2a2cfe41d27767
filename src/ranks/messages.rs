//! What ranks say to each other on the control line: JSON, one message a line.

use std::io::{BufRead, BufReader, Error as IoError, ErrorKind, Read, Write};
use std::net::TcpStream;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::progress::Progress;
use super::verdict::Verdict;

/// A longer line is not ours.
const LONGEST: u64 = 1 << 20;
/// What the first message of ours begins with, for whoever else comes to the port.
pub const GREETING: &str = "mmpo-fast control line 1";

/// A message of the control line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// The first of a rank to rank 0.
    Hello(Hello),
    /// The answer: the name of rank 0's machine.
    Welcome(String),
    /// The answer to a process that does not belong here, and why.
    Refused(String),
    /// A rank's part of an exchange, or rank 0's answer to all.
    Part {
        /// Which exchange.
        tag: String,
        /// What is exchanged.
        value: Value,
    },
    /// A sign of life.
    Alive(Progress),
    /// A rank ends with an error, or rank 0 says what happened to one.
    Verdict(Verdict),
    /// The sender ends as it should.
    Goodbye,
}

/// Who comes to rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`GREETING`].
    pub greeting: String,
    /// The program's version.
    pub version: String,
    /// [`super::Ranks::job`].
    pub job: String,
    /// Its rank.
    pub rank: usize,
    /// How many ranks it was told there are.
    pub ranks: usize,
    /// Its machine.
    pub host: String,
}

/// What must be the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// Hash of the model that training starts from.
    pub model: String,
    /// Hash of the training pairs.
    pub data: String,
    /// Hash of the evaluation pairs; empty without any.
    pub evaluation: String,
    /// Hash of the reference; empty where it is the model.
    pub reference: String,
    /// The resolved recipe, TOML.
    pub config: String,
}

impl Fingerprints {
    /// What differs between these and another rank's, in words; `None` where nothing does.
    pub fn difference(&self, other: &Fingerprints) -> Option<String> {
        let hashes = [
            ("model", &self.model, &other.model),
            ("training pairs", &self.data, &other.data),
            ("evaluation pairs", &self.evaluation, &other.evaluation),
            ("reference", &self.reference, &other.reference),
        ];
        for (name, ours, theirs) in hashes {
            if ours != theirs {
                return Some(format!("have different {name} (hashes {} and {})", short(ours), short(theirs)));
            }
        }
        if self.config == other.config {
            return None;
        }
        let [ours, theirs] = [self, other].map(|side| side.config.parse::<toml::Table>().unwrap_or_default());
        let of = |table: &toml::Table, name: &str| {
            table.get(name).map_or_else(|| "nothing".to_string(), toml::Value::to_string)
        };
        let name = ours.keys().chain(theirs.keys()).find(|name| ours.get(*name) != theirs.get(*name));
        Some(match name {
            Some(name) => {
                format!("have different options: `{name}` is {} and {}", of(&ours, name), of(&theirs, name))
            }
            None => "have different recipes".to_string(),
        })
    }
}

fn short(hash: &str) -> &str {
    match hash.get(..12) {
        Some(beginning) => beginning,
        None if hash.is_empty() => "none",
        None => hash,
    }
}

/// Writes a message.
pub fn send(stream: &mut TcpStream, message: &Message) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads a message; `None` where the sender has closed the line.
pub fn receive(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Message>> {
    let mut line = Vec::new();
    reader.take(LONGEST).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(IoError::new(ErrorKind::InvalidData, "a line that does not end"));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    /// What `receive` makes of these bytes, after which the sender closes the line.
    fn received(bytes: Vec<u8>) -> std::io::Result<Option<Message>> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // The reader may have left before the end of a line that is too long.
        let sender = std::thread::spawn(move || _ = sender.write_all(&bytes));
        let found = receive(&mut BufReader::new(listener.accept().unwrap().0));
        sender.join().unwrap();
        found
    }

    /// A sender that dies in the middle of a line has not said it, and one whose line has no end is none of ours.
    #[test]
    fn a_line_counts_when_it_ends() {
        assert_eq!(received(b"\"Goodbye\"\n".to_vec()).unwrap(), Some(Message::Goodbye));
        assert_eq!(received(Vec::new()).unwrap(), None);
        let part = |bytes: usize| format!("{{\"Welcome\":\"{}\"}}\n", "a".repeat(bytes)).into_bytes();
        assert!(received(part(100_000)).unwrap().is_some());
        for wrong in [b"\"Goodbye\"".to_vec(), b"Goodbye\n".to_vec(), part(LONGEST as usize)] {
            assert_eq!(received(wrong).unwrap_err().kind(), ErrorKind::InvalidData);
        }
    }

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let ours = Fingerprints {
            model: "0123456789abcdef".into(),
            data: "d".into(),
            evaluation: String::new(),
            reference: String::new(),
            config: "beta = 0.1\nseed = 42\n".into(),
        };
        assert_eq!(ours.difference(&ours.clone()), None);
        let model = Fingerprints { model: "fedcba9876543210".into(), ..ours.clone() };
        let text = ours.difference(&model).unwrap();
        assert!(text.contains("different model (hashes 0123456789ab and fedcba987654)"), "{text}");
        let pairs = Fingerprints { data: "e".into(), ..ours.clone() };
        let text = ours.difference(&pairs).unwrap();
        assert!(text.contains("different training pairs (hashes d and e)"), "{text}");
        let reference = Fingerprints { reference: "0123456789abcdef".into(), ..ours.clone() };
        let text = ours.difference(&reference).unwrap();
        assert!(text.contains("different reference (hashes none and 0123456789ab)"), "{text}");
        let pairs = Fingerprints { evaluation: "e".into(), ..ours.clone() };
        let text = ours.difference(&pairs).unwrap();
        assert!(text.contains("evaluation pairs (hashes none and e)"), "{text}");
        let reference = Fingerprints { reference: "r".into(), ..ours.clone() };
        let text = ours.difference(&reference).unwrap();
        assert!(text.contains("different reference (hashes none and r)"), "{text}");
        let config = Fingerprints { config: "beta = 0.1\nseed = 43\n".into(), ..ours.clone() };
        assert!(ours.difference(&config).unwrap().contains("`seed` is 42 and 43"));
        let fewer = Fingerprints { config: "beta = 0.1\n".into(), ..ours.clone() };
        assert!(ours.difference(&fewer).unwrap().contains("`seed` is 42 and nothing"));
    }
}
