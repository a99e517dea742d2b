//! A database that the SDK wrote, damaged: in the bytes of its file, or in the columns of its rows,
//! and then used as a service would. What can be found out is in README.md.

mod damage;
mod sound;
mod using;

use crate::Target;

/// Bytes of the file are flipped, overwritten or cut off.
pub(crate) const FILE: Target = Target {
    name: "sqlite_file",
    run: file,
    words: &["\0", "\u{1}", "\u{2}", "\u{3}", "\u{4}"],
    cost: 250,
};

/// Columns are set to values of any kind, as another program could.
pub(crate) const ROWS: Target = Target {
    name: "sqlite_rows",
    run: rows,
    words: damage::WORDS,
    cost: 250,
};

fn file(data: &[u8]) {
    let sound = &*sound::SOUND;
    let place = tempfile::tempdir().expect("a directory can be made");
    let path = place.path().join("damaged.db");
    let damaged = damage::of_bytes(&sound.file, data);
    std::fs::write(&path, damaged).expect("a file can be written");
    crate::runtime().block_on(using::everything(&path, sound));
}

fn rows(data: &[u8]) {
    let sound = &*sound::SOUND;
    let place = tempfile::tempdir().expect("a directory can be made");
    let path = place.path().join("damaged.db");
    std::fs::write(&path, &sound.file).expect("a file can be written");
    crate::runtime().block_on(async {
        damage::of_rows(&path, data).await;
        using::everything(&path, sound).await;
    });
}
