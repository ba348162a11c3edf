//! What is told of machines' disks.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use common::{Home, IMAGE};
use kiln_contract::{DiskId, InstanceId};

#[test]
fn df_tells_of_each_machines_disk_its_size_and_what_it_takes_alone_and_with_its_copy() {
    const DATA: usize = 4 << 20;
    let Some(home) = Home::with_busybox() else { return };
    let [original, copy] = ["original", "copy"].map(|name| {
        let id = home.ok(["create", "--vm", "--name", name, IMAGE, "true"]);
        DiskId::from(&id.parse::<InstanceId>().unwrap())
    });
    let backend = kiln_disk::open(&kiln_contract::Home::at(home.path()), &kiln_disk::Choice::Auto);
    let disks = backend.unwrap().backend;
    let path = disks.create(&original, 64 << 20).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&vec![7; DATA], 32 << 20).unwrap();
    file.sync_all().unwrap();
    disks.clone_disk(&original, None, &copy).unwrap();
    let told = home.json(["system", "df", "--format", "json"]);
    for (name, id) in [("original", &original), ("copy", &copy)] {
        let all = told["disks"].as_array().unwrap();
        let disk = all.iter().find(|disk| disk["name"] == name).unwrap();
        assert_eq!(disk["id"], id.to_string(), "{told}");
        assert_eq!(disk["logical_bytes"], 64 << 20, "{told}");
        let [exclusive, shared] = ["exclusive_bytes", "shared_bytes"].map(|key| disk[key].as_u64().unwrap());
        assert!(exclusive + shared >= DATA as u64 && exclusive + shared < 64 << 20, "{told}");
    }
    let table = home.ok(["system", "df", "--verbose"]);
    let row = table.lines().find(|line| line.starts_with("copy") && line.contains("64.0 MiB"));
    assert_eq!(row.map(|row| row.split_whitespace().count()), Some(7), "{table}");
}
