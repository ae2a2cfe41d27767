//! Model folders and training state: what is read, what is refused, and what survives a failure.

#[test]
fn the_fixture_opens() {
    let Some(folder) = std::env::var_os("MMPO_FAST_FIXTURES") else {
        println!("MMPO_FAST_FIXTURES is not set: skipped");
        return;
    };
    let folder =
        mmpo_fast::checkpoint::ModelFolder::open(&std::path::Path::new(&folder).join("tiny-llama/model"));
    let folder = folder.unwrap();
    folder.check_finite().unwrap();
    println!("{:?} {}", folder.fingerprint(), folder.config().to_saved_json());
    for spec in folder.config().tensors() {
        assert_eq!(folder.tensor(&spec.name, &spec.shape).unwrap().len(), spec.values());
    }
}
