//! `--memory`: how much device memory a run may take.

use std::fmt;

use toml::de::DeValue;

use super::value::{OptionValue, toml_kind};

/// How much device memory a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryLimit {
    /// At most this many bytes.
    Bytes(usize),
    /// What is free, and the run chooses options with which it fits.
    Auto,
}

/// Units, in the order in which a number of bytes is written: the first that divides it.
const UNITS: [(&str, usize); 5] =
    [("GiB", 1 << 30), ("GB", 1_000_000_000), ("MiB", 1 << 20), ("MB", 1_000_000), ("B", 1)];

impl MemoryLimit {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("must be a size such as 24GB, 22.5GiB or 800MB, or auto, not `{text}`");
        let trimmed = text.trim();
        if trimmed == "auto" {
            return Ok(MemoryLimit::Auto);
        }
        let end = trimmed.find(|letter: char| letter.is_ascii_alphabetic()).ok_or_else(wrong)?;
        let (number, unit) = (trimmed[..end].trim(), &trimmed[end..]);
        let (_, size) = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(wrong)?;
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let bytes = (number * *size as f64).round();
        // Beyond 2^53 bytes not every number has an f64.
        match bytes >= 1.0 && bytes <= (1_u64 << 53) as f64 {
            true => Ok(MemoryLimit::Bytes(bytes as usize)),
            false => Err(format!("must be at least 1 byte and at most 8 PiB, not `{text}`")),
        }
    }
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemoryLimit::Bytes(bytes) = *self else { return f.write_str("auto") };
        let (name, size) =
            UNITS.into_iter().find(|(_, size)| bytes.is_multiple_of(*size)).unwrap_or(("B", 1));
        write!(f, "{}{name}", bytes / size)
    }
}

impl OptionValue for MemoryLimit {
    const PLACEHOLDER: &'static str = "SIZE|auto";

    fn from_text(text: &str) -> Result<Self, String> {
        Self::parse(text)
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value
            .as_str()
            .ok_or_else(|| format!("must be a size in quotes, such as \"24GB\", not {}", toml_kind(value)))?;
        Self::parse(text)
    }

    fn to_toml(&self) -> String {
        format!("\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_they_print() {
        for (text, bytes) in [
            ("24GB", 24_000_000_000),
            ("80GiB", 80 << 30),
            ("512MiB", 512 << 20),
            ("7MB", 7_000_000),
            ("1B", 1),
        ] {
            assert_eq!(MemoryLimit::parse(text), Ok(MemoryLimit::Bytes(bytes)), "{text}");
            assert_eq!(MemoryLimit::Bytes(bytes).to_string(), text);
        }
        assert_eq!(MemoryLimit::parse("22.5 gib"), Ok(MemoryLimit::Bytes(45 << 29)));
        assert_eq!(MemoryLimit::parse("auto").map(|limit| limit.to_string()).as_deref(), Ok("auto"));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["24", "GB", "24XB", "", "-1GB", "0GB", "nanGB", "infGB", "1e300GB", "automatic", "1GB2"]
        {
            let error = MemoryLimit::parse(text).expect_err(text);
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }
}
