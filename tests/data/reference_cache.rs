//! The reference log-prob cache: found again, and never believed when damaged or foreign.

use mmpo_fast::Error;
use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{CacheKey, ReferenceCache};
use mmpo_fast::objective::ReferencePair;

fn key() -> CacheKey<'static> {
    CacheKey {
        weights: [1; 32],
        tokenizer: [2; 32],
        template: [3; 32],
        data: [4; 32],
        limits: LengthLimits { max_length: 512, max_prompt_length: 256 },
        compute: "cpu f32",
    }
}

fn references() -> Vec<ReferencePair> {
    (0..7u16)
        .map(|n| ReferencePair {
            logp_chosen: -f32::from(n) / 3.0,
            logp_rejected: -1e-20 * f32::from(n),
            tokens_chosen: u32::from(n) + 1,
            tokens_rejected: u32::MAX - u32::from(n),
        })
        .collect()
}

#[test]
fn what_was_stored_is_found_bit_for_bit_and_not_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ReferenceCache::new(&folder.path().join("new"), &key());
    assert_eq!(cache.load(7), None);
    let computed = cache.load_or_compute(7, || Ok(references())).unwrap();
    let loaded = cache.load_or_compute(7, || panic!("computed twice")).unwrap();
    assert_eq!(computed, loaded);
    let names: Vec<_> = std::fs::read_dir(folder.path().join("new")).unwrap().collect();
    assert_eq!(names.len(), 1, "no temporary file is left: {names:?}");
}

#[test]
fn every_part_of_the_key_changes_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let limits = |max_length, max_prompt_length| LengthLimits { max_length, max_prompt_length };
    let keys = [
        key(),
        CacheKey { weights: [9; 32], ..key() },
        CacheKey { tokenizer: [9; 32], ..key() },
        CacheKey { template: [9; 32], ..key() },
        CacheKey { data: [9; 32], ..key() },
        CacheKey { limits: limits(513, 256), ..key() },
        CacheKey { limits: limits(512, 255), ..key() },
        CacheKey { compute: "cuda bf16", ..key() },
    ];
    let paths: std::collections::HashSet<_> =
        keys.iter().map(|key| ReferenceCache::new(folder.path(), key).path().to_path_buf()).collect();
    assert_eq!(paths.len(), keys.len());
}

#[test]
fn a_damaged_file_is_computed_again_and_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ReferenceCache::new(folder.path(), &key());
    cache.store(&references()).unwrap();
    let whole = std::fs::read(cache.path()).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() - 40] ^= 1;
    for damaged in [&whole[..whole.len() - 1], &whole[..20], &[], b"{}\n", &flipped] {
        std::fs::write(cache.path(), damaged).unwrap();
        assert_eq!(cache.load(7), None, "{} bytes", damaged.len());
        assert_eq!(cache.load_or_compute(7, || Ok(references())).unwrap(), references());
        assert_eq!(std::fs::read(cache.path()).unwrap(), whole);
    }
}

#[test]
fn a_file_of_other_data_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let other = ReferenceCache::new(folder.path(), &CacheKey { data: [9; 32], ..key() });
    other.store(&references()).unwrap();
    let cache = ReferenceCache::new(folder.path(), &key());
    std::fs::copy(other.path(), cache.path()).unwrap();
    assert_eq!(cache.load(7), None, "a renamed file of another key");
    cache.store(&references()).unwrap();
    assert_eq!(cache.load(6), None, "another number of pairs");
    assert_eq!(cache.load(7), Some(references()));
}

#[test]
fn the_file_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ReferenceCache::new(folder.path(), &key());
    cache.store(&references()).unwrap();
    let bytes = std::fs::read(cache.path()).unwrap();
    let end = bytes.iter().position(|&byte| byte == b'\n').unwrap();
    let header: serde_json::Value = serde_json::from_slice(&bytes[..end]).unwrap();
    assert_eq!(header["format"], "mmpo-fast reference log-probs");
    assert_eq!((header["pairs"].as_u64(), header["compute"].as_str()), (Some(7), Some("cpu f32")));
    assert_eq!(bytes.len(), end + 1 + 7 * 16 + 32);
}

#[test]
fn a_place_that_cannot_be_written_is_an_error_and_a_failed_computation_stores_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let error = ReferenceCache::new(&file, &key()).store(&references()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let cache = ReferenceCache::new(folder.path(), &key());
    assert!(cache.load_or_compute(7, || Err(Error::numerics("NaN", "none"))).is_err());
    assert!(!cache.path().exists());
}

#[test]
fn a_part_is_kept_apart_from_the_whole_and_goes_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ReferenceCache::new(folder.path(), &key());
    assert!(cache.load_partial(7).is_empty());
    cache.store_partial(&references()[..3], 7).unwrap();
    assert_eq!(cache.load_partial(7), references()[..3]);
    assert!(cache.load_partial(6).is_empty(), "another number of pairs");
    assert_eq!(cache.load(7), None, "a part is not the whole");
    cache.store(&references()).unwrap();
    assert!(cache.load_partial(7).is_empty());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn what_others_could_have_written_or_is_no_file_is_not_believed() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("new/cache");
    let cache = ReferenceCache::new(&place, &key());
    cache.store(&references()).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&place), mode(cache.path())), (0o700, 0o600));
    std::fs::set_permissions(cache.path(), PermissionsExt::from_mode(0o620)).unwrap();
    assert_eq!(cache.load(7), None, "the group can write it");
    std::fs::set_permissions(cache.path(), PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(cache.load(7), Some(references()));
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(cache.path(), Some(12345), None).unwrap();
        assert_eq!(cache.load(7), None, "another user's");
    }
    for what in ["folder", "fifo", "endless"] {
        std::fs::remove_file(cache.path()).unwrap();
        match what {
            "folder" => std::fs::create_dir(cache.path()).unwrap(),
            "fifo" => {
                let made = std::process::Command::new("mkfifo").arg(cache.path()).status().unwrap();
                assert!(made.success());
            }
            _ => std::os::unix::fs::symlink("/dev/zero", cache.path()).unwrap(),
        }
        assert_eq!(cache.load(7), None, "{what}");
        if what == "folder" {
            assert!(cache.store(&references()).is_err());
            std::fs::remove_dir(cache.path()).unwrap();
            std::fs::write(cache.path(), "").unwrap();
        }
    }
}
