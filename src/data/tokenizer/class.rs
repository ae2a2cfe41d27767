//! Tokenizer classes of transformers.
//!
//! `tokenizer_class` of `tokenizer_config.json` (else of `config.json`) names a class. Some classes take only the
//! vocabulary, the merges and the post-processor of `tokenizer.json` and build the other parts anew, by rules of their
//! own and by `legacy` and `add_prefix_space` of the config. The ids follow from what the class builds, so it is built
//! here too, as transformers 5.23 does. A class without such rules takes `tokenizer.json` as it stands.

use serde_json::{Map, Value, json};

/// How the parts of `tokenizer.json` are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// As they stand.
    AsWritten,
    Llama,
    CodeLlama,
    Gpt2,
    GptNeoX,
    Qwen2,
    Gemma,
    Cohere,
}

/// Names without rules of their own.
const AS_WRITTEN: [&str; 3] = ["PreTrainedTokenizer", "TokenizersBackend", "BloomTokenizer"];

/// The class that transformers takes for a model of this `model_type` whatever its files say: published files of Qwen2 name
/// other classes by mistake, and Mistral's files are taken as they stand.
pub(super) fn of_family(model_type: Option<&str>) -> Option<&'static str> {
    match model_type? {
        "qwen2" => Some("Qwen2Tokenizer"),
        "mistral" => Some("TokenizersBackend"),
        _ => None,
    }
}

impl Class {
    /// The class that `name` means for this tokenizer, and whether the name is known.
    pub(super) fn of(name: Option<&str>, tokenizer: &Value) -> (Self, bool) {
        let Some(name) = name else { return (Class::AsWritten, true) };
        let class = match name.strip_suffix("Fast").unwrap_or(name) {
            // Byte-level tokenizers often bear this name by mistake; transformers notices too.
            "LlamaTokenizer" if is_byte_level(tokenizer) => Class::AsWritten,
            "LlamaTokenizer" => Class::Llama,
            "CodeLlamaTokenizer" => Class::CodeLlama,
            "GPT2Tokenizer" => Class::Gpt2,
            "GPTNeoXTokenizer" => Class::GptNeoX,
            "Qwen2Tokenizer" => Class::Qwen2,
            "GemmaTokenizer" => Class::Gemma,
            "CohereTokenizer" => Class::Cohere,
            other => return (Class::AsWritten, AS_WRITTEN.contains(&other)),
        };
        // All of these build a BPE model; another model has no merges to build it from.
        let is_bpe = tokenizer.pointer("/model/type").is_some_and(|model| model == "BPE");
        (if is_bpe { class } else { Class::AsWritten }, true)
    }

    /// Special tokens that the class has where the config names none.
    pub(super) fn default_tokens(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Class::AsWritten => &[],
            Class::Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Class::CodeLlama => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("prefix_token", "▁<PRE>"),
                ("middle_token", "▁<MID>"),
                ("suffix_token", "▁<SUF>"),
                ("eot_token", "▁<EOT>"),
                ("fill_token", "<FILL_ME>"),
            ],
            Class::Gpt2 => {
                &[("bos_token", END_OF_TEXT), ("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT)]
            }
            Class::GptNeoX => &[
                ("bos_token", END_OF_TEXT),
                ("eos_token", END_OF_TEXT),
                ("unk_token", END_OF_TEXT),
                ("pad_token", "<|padding|>"),
            ],
            Class::Qwen2 => {
                &[("eos_token", END_OF_TEXT), ("unk_token", END_OF_TEXT), ("pad_token", END_OF_TEXT)]
            }
            Class::Gemma => &[
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Class::Cohere => &[
                ("bos_token", "<BOS_TOKEN>"),
                ("eos_token", "<|END_OF_TURN_TOKEN|>"),
                ("unk_token", "<UNK>"),
                ("sep_token", "<SEP>"),
                ("pad_token", "<PAD>"),
                ("cls_token", "<CLS>"),
                ("mask_token", "<MASK_TOKEN>"),
            ],
        }
    }

    /// Whether the class puts `bos_token` in front of plain text whatever the file's post-processor does.
    pub(super) fn forces_bos(self) -> bool {
        self == Class::CodeLlama
    }

    /// Builds the parts anew that the class does not take from the file. Added tokens go too: they are added again,
    /// from the config's own list if it has one.
    pub(super) fn rebuild(self, tokenizer: &mut Value, config: &Map<String, Value>) {
        if self == Class::AsWritten {
            return;
        }
        let Some(parts) = tokenizer.as_object_mut() else { return };
        parts.insert("added_tokens".to_string(), json!([]));
        let space =
            |absent: bool| config.get("add_prefix_space").map_or(absent, |given| truthy(given, absent));
        let (normalizer, pre_tokenizer, decoder) = match self {
            Class::AsWritten => return,
            Class::Llama => {
                let legacy = config.get("legacy").is_some_and(|given| truthy(given, false));
                let space = space(true);
                let scheme = match (space, legacy) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                (Value::Null, metaspace(scheme), sentencepiece_decoder(space))
            }
            Class::CodeLlama => {
                let scheme = if space(true) { "first" } else { "never" };
                (Value::Null, metaspace(scheme), sentencepiece_decoder(true))
            }
            Class::Gpt2 => (Value::Null, byte_level(space(false), true), byte_level(true, true)),
            Class::GptNeoX => (nfc(), byte_level(space(false), true), byte_level(true, true)),
            Class::Qwen2 => (nfc(), qwen2_words(space(false)), byte_level(true, true)),
            Class::Gemma => (
                json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
                json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false}),
                sentencepiece_decoder(false),
            ),
            Class::Cohere => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                let words = sequence("pretokenizers", vec![digits, byte_level(space(false), true)]);
                (nfc(), words, byte_level(space(false), true))
            }
        };
        parts.insert("normalizer".to_string(), normalizer);
        parts.insert("pre_tokenizer".to_string(), pre_tokenizer);
        parts.insert("decoder".to_string(), decoder);
        if let Some(model) = parts.get_mut("model").and_then(Value::as_object_mut) {
            self.set_model_options(model, config);
        }
    }

    fn set_model_options(self, model: &mut Map<String, Value>, config: &Map<String, Value>) {
        let sentencepiece = matches!(self, Class::Llama | Class::CodeLlama | Class::Gemma);
        let unknown = match self {
            Class::CodeLlama | Class::Gemma => match config.get("unk_token") {
                Some(Value::Object(token)) => token.get("content").cloned().unwrap_or(json!("<unk>")),
                Some(Value::String(token)) => json!(token),
                _ => json!("<unk>"),
            },
            _ => Value::Null,
        };
        let affix = if sentencepiece { Value::Null } else { json!("") };
        for (option, value) in [
            ("dropout", Value::Null),
            ("unk_token", unknown),
            ("continuing_subword_prefix", affix.clone()),
            ("end_of_word_suffix", affix),
            ("fuse_unk", json!(sentencepiece)),
            ("byte_fallback", json!(sentencepiece)),
            ("ignore_merges", json!(false)),
        ] {
            model.insert(option.to_string(), value);
        }
    }
}

const END_OF_TEXT: &str = "<|endoftext|>";

/// How Qwen 2 cuts text into words.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Python's truth of a config value; null counts as `absent`.
pub(super) fn truthy(value: &Value, absent: bool) -> bool {
    match value {
        Value::Null => absent,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(members) => !members.is_empty(),
    }
}

fn is_byte_level(tokenizer: &Value) -> bool {
    fn holds(value: &Value) -> bool {
        match value {
            Value::String(text) => text == "ByteLevel",
            Value::Array(items) => items.iter().any(holds),
            Value::Object(members) => members.values().any(holds),
            _ => false,
        }
    }
    let parts = ["normalizer", "pre_tokenizer", "post_processor", "decoder"];
    parts.iter().any(|part| tokenizer.get(part).is_some_and(holds))
}

fn sequence(name: &str, parts: Vec<Value>) -> Value {
    let mut members = Map::new();
    members.insert("type".to_string(), json!("Sequence"));
    members.insert(name.to_string(), Value::Array(parts));
    Value::Object(members)
}

fn nfc() -> Value {
    json!({"type": "NFC"})
}

fn metaspace(scheme: &str) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false})
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex
    })
}

fn qwen2_words(add_prefix_space: bool) -> Value {
    let words =
        json!({"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": false});
    sequence("pretokenizers", vec![words, byte_level(add_prefix_space, false)])
}

fn sentencepiece_decoder(strips_first_space: bool) -> Value {
    let mut parts = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if strips_first_space {
        parts.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    sequence("decoders", parts)
}
