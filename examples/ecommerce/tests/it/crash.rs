//! The crash campaign, short: `dev/test only crashes` runs it long.

use crate::ecommerce;

fn campaign(arguments: &[&str]) {
    let output = ecommerce(&[&["campaign"], arguments].concat());
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("nothing lost, nothing twice"), "{text}");
}

#[test]
fn a_shop_that_is_killed_ten_times_and_at_every_step_loses_nothing() {
    campaign(&["--kills", "10", "--steps", "1", "--seed", "1"]);
}

#[test]
fn two_processes_on_one_file_lose_nothing_when_one_of_them_is_killed() {
    campaign(&["--kills", "5", "--steps", "0", "--shape", "split"]);
    campaign(&["--kills", "5", "--steps", "0", "--shape", "twins"]);
}

#[test]
fn a_shop_that_is_told_to_stop_under_load_loses_nothing() {
    campaign(&["--kills", "0", "--steps", "0", "--terms", "20"]);
}
