//! Compiling files to objects, in parallel, and only those whose input changed.
//!
//! An object is keyed by compiler and flags, its source and every header, so touching one kernel recompiles
//! that kernel alone. What the compiler printed is kept beside the object, because ptxas' report is reviewed on every
//! build and not only on the one that compiled.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Result;

/// Compiles to the object of this path, and returns what the compiler printed.
pub type Compile<'a> = dyn Fn(&Path) -> Result<String> + Send + Sync + 'a;

/// One file to compile.
pub struct Job<'a> {
    pub source: PathBuf,
    /// Whatever decides, beside source and headers, what comes out: compiler and flags.
    pub fingerprint: String,
    pub compile: Box<Compile<'a>>,
}

pub struct Compiled {
    pub source: PathBuf,
    pub object: PathBuf,
    /// What the compiler printed.
    pub output: String,
}

pub struct Cache {
    folder: PathBuf,
    headers: u64,
}

impl Cache {
    /// Keeps objects below `folder`; a change of any of `headers` makes all of them stale.
    pub fn new(folder: &Path, headers: &[PathBuf]) -> Result<Self> {
        let mut hasher = DefaultHasher::new();
        for header in headers {
            header.hash(&mut hasher);
            read(header)?.hash(&mut hasher);
        }
        Ok(Cache { folder: folder.to_owned(), headers: hasher.finish() })
    }

    /// Compiles `jobs` into objects of `build` (`gpu`, `plain`, ..), as many at once as cargo allows.
    pub fn compile(&self, build: &str, jobs: &[Job<'_>]) -> Result<Vec<Compiled>> {
        let folder = self.folder.join(build);
        std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let workers = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs.len().min(workers) {
                scope.spawn(|| {
                    while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = self.compile_one(&folder, job);
                        results.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(result);
                    }
                });
            }
        });
        let results = results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut compiled = results.into_iter().collect::<Result<Vec<Compiled>>>()?;
        compiled.sort_by(|a, b| a.source.cmp(&b.source));
        Ok(compiled)
    }

    fn compile_one(&self, folder: &Path, job: &Job<'_>) -> Result<Compiled> {
        // The path, not the stem: kernels/memory.cu is not kernels/emulator/memory.cpp.
        let stem = job.source.with_extension("").display().to_string().replace('/', "-");
        let object = folder.join(format!("{stem}.o"));
        let log = folder.join(format!("{stem}.log"));
        let key_file = folder.join(format!("{stem}.key"));
        let key = format!("{:016x}", self.key(job)?);
        let cached = std::fs::read_to_string(&key_file).is_ok_and(|old| old == key) && object.exists();
        let output = match std::fs::read_to_string(&log) {
            Ok(output) if cached => output,
            _ => {
                // A key is written last: an interrupted compilation leaves none that matches.
                let _absent_is_fine = std::fs::remove_file(&key_file);
                let output = (job.compile)(&object)?;
                write(&log, &output)?;
                write(&key_file, &key)?;
                output
            }
        };
        Ok(Compiled { source: job.source.clone(), object, output })
    }

    fn key(&self, job: &Job<'_>) -> Result<u64> {
        let mut hasher = DefaultHasher::new();
        (self.headers, &job.fingerprint).hash(&mut hasher);
        read(&job.source)?.hash(&mut hasher);
        Ok(hasher.finish())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
