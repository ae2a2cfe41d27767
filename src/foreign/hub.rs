//! Models and data sets that the Hugging Face Hub's own tools have put on this disk, found by their names. Nothing here
//! goes over a network.
//!
//! The layout is that of `huggingface_hub`: a folder `models--OWNER--NAME` or `datasets--OWNER--NAME` in the cache, with
//! the files of each revision in `snapshots/COMMIT` and the commits of branches and tags in `refs`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::{PairFile, PairFiles};
use crate::error::{Error, Result};

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Dataset,
}

impl Kind {
    fn folder(self, id: &Id) -> String {
        let prefix = if self == Kind::Model { "models" } else { "datasets" };
        format!("{prefix}--{}", id.name.replace('/', "--"))
    }

    fn words(self) -> &'static str {
        if self == Kind::Model { "model" } else { "data set" }
    }

    /// The command that fetches it into the cache.
    fn download(self, id: &Id) -> String {
        let kind = if self == Kind::Model { "" } else { " --repo-type dataset" };
        let revision =
            id.revision.as_ref().map_or_else(String::new, |revision| format!(" --revision {revision}"));
        format!("`hf download {}{kind}{revision}`", id.name)
    }
}

/// `OWNER/NAME`, or `NAME` alone as the Hub's oldest have it, and perhaps `@REVISION`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Id {
    name: String,
    revision: Option<String>,
}

/// Endings of the files that pairs are read from: a path with one is a file that is missing, and no name on the Hub.
const FILE_ENDINGS: [&str; 8] = ["jsonl", "json", "gz", "csv", "tsv", "parquet", "txt", "ndjson"];

impl Id {
    fn read(text: &str) -> Option<Self> {
        const SITES: [&str; 4] =
            ["https://huggingface.co/", "http://huggingface.co/", "https://hf.co/", "hf://"];
        let text = SITES.into_iter().find_map(|site| text.strip_prefix(site)).unwrap_or(text);
        let text = text.strip_prefix("datasets/").unwrap_or(text).trim_end_matches('/');
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision.to_string())),
            None => (text, None),
        };
        let is_word = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let parts: Vec<&str> = name.split('/').collect();
        let is_id = (1..=2).contains(&parts.len())
            && parts.iter().all(|part| is_word(part))
            && revision.as_ref().is_none_or(|revision| revision.split('/').all(is_word));
        is_id.then(|| Id { name: name.to_string(), revision })
    }

    fn has_owner(&self) -> bool {
        self.name.contains('/')
    }
}

/// The cache's folder, as `huggingface_hub` finds it.
pub fn cache() -> PathBuf {
    cache_of(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
}

fn cache_of(variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let home = || variable("HOME").map(PathBuf::from).unwrap_or_default();
    // A `~` is left to the programs where no shell read the variable, as in a container's or a service's settings.
    let folder = |name: &str| {
        let folder = PathBuf::from(variable(name)?);
        Some(match folder.strip_prefix("~") {
            Ok(inside) => home().join(inside),
            Err(_) => folder,
        })
    };
    if let Some(hub) = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE")) {
        return hub;
    }
    let hugging_face = folder("HF_HOME").unwrap_or_else(|| {
        let caches = folder("XDG_CACHE_HOME");
        caches.unwrap_or_else(|| home().join(".cache")).join("huggingface")
    });
    hugging_face.join("hub")
}

/// The folder of a model: `path` itself if it is there, else the snapshot of the cache that it names. A path that is
/// neither is returned as it is, and the code that opens it will report it.
///
/// # Errors
/// [`Error::Model`] where the cache has the model and not the revision.
pub fn model(path: &Path) -> Result<PathBuf> {
    if path.exists() || path.is_symlink() {
        return Ok(path.to_path_buf());
    }
    let Some(id) = path.to_str().and_then(Id::read) else { return Ok(path.to_path_buf()) };
    match snapshot(&cache(), Kind::Model, &id) {
        Ok(Some(folder)) => {
            tracing::info!("{} is {}", path.display(), folder.display());
            Ok(folder)
        }
        Ok(None) => Ok(path.to_path_buf()),
        Err((message, help)) => Err(Error::model(path, message, help)),
    }
}

/// What to say of a path that looks like a model's name on the Hub and is not in the cache: the problem, and what to do.
pub fn absent_model(path: &Path) -> Option<(String, String)> {
    let id = path.to_str().and_then(Id::read).filter(Id::has_owner)?;
    let owner = id.name.split('/').next().unwrap_or_default();
    (!Path::new(owner).exists()).then(|| absent(Kind::Model, &id, "no such folder"))
}

/// The files of pairs with each name of a data set on the Hub replaced by its snapshot in the cache.
///
/// # Errors
/// [`Error::Data`] for a name that is not in the cache, with the command that fetches it.
pub fn pairs(files: &PairFiles) -> Result<PairFiles> {
    let located = |file: &PairFile| Ok(PairFile { path: dataset(&file.path)?, weight: file.weight });
    files.0.iter().map(located).collect::<Result<_>>().map(PairFiles)
}

fn dataset(path: &Path) -> Result<PathBuf> {
    let text = path.to_string_lossy();
    let site = if text.contains("://") { text.find("://").map_or(0, |at| at + 3) } else { 0 };
    let (base, split) = match text[site..].rsplit_once(':') {
        Some((base, split)) => (&text[..site + base.len()], Some(split)),
        None => (&*text, None),
    };
    if path.exists() || path.is_symlink() || Path::new(base).exists() {
        return Ok(path.to_path_buf());
    }
    let Some(id) = Id::read(base) else { return Ok(path.to_path_buf()) };
    match snapshot(&cache(), Kind::Dataset, &id) {
        Ok(Some(folder)) => {
            tracing::info!("{base} is {}", folder.display());
            let split = split.map_or_else(String::new, |split| format!(":{split}"));
            Ok(PathBuf::from(format!("{}{split}", folder.display())))
        }
        Ok(None) if is_missing_file(&id) => Ok(path.to_path_buf()),
        Ok(None) => {
            let (message, help) = absent(Kind::Dataset, &id, "no such file or folder");
            Err(Error::data(path, None, message, help))
        }
        Err((message, help)) => Err(Error::data(path, None, message, help)),
    }
}

/// Whether a name that is not in the cache was rather meant as a path.
fn is_missing_file(id: &Id) -> bool {
    let ending = Path::new(&id.name).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let owner = id.name.split('/').next().unwrap_or_default();
    FILE_ENDINGS.contains(&ending) || !id.has_owner() || Path::new(owner).exists()
}

fn absent(kind: Kind, id: &Id, nothing: &str) -> (String, String) {
    (
        format!(
            "{nothing}, and the Hugging Face cache {} has no {} of this name; nothing is downloaded here",
            cache().display(),
            kind.words()
        ),
        format!(
            "check the path; a {} on the Hub is fetched into the cache with {}",
            kind.words(),
            kind.download(id)
        ),
    )
}

/// The folder of a revision in `cache`; `None` where nothing of this name is there. The error is a message and its
/// advice.
fn snapshot(cache: &Path, kind: Kind, id: &Id) -> std::result::Result<Option<PathBuf>, (String, String)> {
    let root = cache.join(kind.folder(id));
    let snapshots = root.join("snapshots");
    if !snapshots.is_dir() {
        return Ok(None);
    }
    let wanted = id.revision.as_deref().unwrap_or("main");
    let commit = std::fs::read_to_string(root.join("refs").join(wanted)).ok();
    let named = commit.as_deref().map_or(wanted, str::trim);
    // A commit is one name: what has a separator in it came from a branch that is not in the cache.
    let folder = snapshots.join(named);
    if !named.is_empty() && !named.contains(['/', '\\']) && named != ".." && folder.is_dir() {
        return Ok(Some(folder));
    }
    let mut held: Vec<String> = std::fs::read_dir(&snapshots)
        .map(|entries| {
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        })
        .unwrap_or_default();
    held.sort();
    let begins: Vec<&String> = held.iter().filter(|name| name.starts_with(wanted)).collect();
    match (begins.as_slice(), held.as_slice(), &id.revision) {
        ([one], _, Some(_)) => Ok(Some(snapshots.join(one))),
        (_, [one], None) => Ok(Some(snapshots.join(one))),
        _ => Err((
            format!(
                "the Hugging Face cache {} has this {} without the revision `{wanted}`; it holds {}",
                cache.display(),
                kind.words(),
                if held.is_empty() { "none".to_string() } else { held.join(", ") }
            ),
            format!("fetch it with {}, or name a revision: {}@REVISION", kind.download(id), id.name),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache_with(variables: &[(&str, &str)]) -> String {
        let value =
            |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into());
        cache_of(value).display().to_string()
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        assert_eq!(cache_with(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache_with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache_with(&[("HOME", "/h"), ("HF_HOME", "/f")]), "/f/hub");
        assert_eq!(cache_with(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), "/c");
        assert_eq!(cache_with(&[("HOME", "/h"), ("HF_HOME", "~/f")]), "/h/f/hub");
        assert_eq!(cache_with(&[("HOME", "/h"), ("HF_HUB_CACHE", "~/c")]), "/h/c");
        assert_eq!(cache_with(&[("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/old");
    }

    #[test]
    fn names_are_told_from_paths() {
        let id = |text: &str| Id::read(text).map(|id| (id.name, id.revision));
        assert_eq!(id("org/name"), Some(("org/name".into(), None)));
        assert_eq!(id("hf://org/name@v1.0"), Some(("org/name".into(), Some("v1.0".into()))));
        assert_eq!(id("https://huggingface.co/datasets/org/name/"), Some(("org/name".into(), None)));
        assert_eq!(id("gpt2"), Some(("gpt2".into(), None)));
        for path in ["../name", "/a/b", "a/b/c", "./a", "", "a b/c", "org/name@../../x", "org/.."] {
            assert_eq!(id(path), None, "{path}");
        }
    }

    #[test]
    fn a_revision_is_found_by_branch_commit_and_its_beginning() {
        let cache = tempfile::tempdir().unwrap();
        let root = cache.path().join("datasets--org--pairs");
        for commit in ["aa11", "bb22"] {
            std::fs::create_dir_all(root.join("snapshots").join(commit)).unwrap();
        }
        std::fs::create_dir_all(root.join("refs")).unwrap();
        std::fs::write(root.join("refs/v1"), "bb22\n").unwrap();
        std::fs::write(root.join("refs/evil"), "../../..").unwrap();
        let found = |text: &str| {
            let id = Id::read(text).unwrap();
            snapshot(cache.path(), Kind::Dataset, &id)
                .map(|path| path.map(|path| path.file_name().unwrap().to_owned()))
        };
        let named = |name: &str| Ok(Some(OsString::from(name)));
        assert_eq!(found("org/pairs@v1"), named("bb22"));
        assert_eq!(found("org/pairs@aa11"), named("aa11"));
        assert_eq!(found("org/pairs@aa"), named("aa11"));
        assert_eq!(found("org/other"), Ok(None));
        for unknown in ["org/pairs", "org/pairs@cc", "org/pairs@evil"] {
            let (message, help) = found(unknown).unwrap_err();
            assert!(message.contains("it holds aa11, bb22"), "{message}");
            assert!(help.contains("hf download org/pairs --repo-type dataset"), "{help}");
        }
        std::fs::write(root.join("refs/main"), "aa11").unwrap();
        assert_eq!(found("org/pairs"), named("aa11"));
    }
}
