//! What is in every machine: Kiln's own program, which must be small, and the writable disk below the root.

use super::{HOME, WHOLE, whole_image};

#[test]
fn the_guest_is_small_and_container_engines_have_the_disk_itself() {
    let Some(home) = &*HOME else { return };
    whole_image(home);
    home.ok(["run", "-d", "--vm", "--memory", "256m", "--name", "lean", WHOLE, "sleep", "600"]);
    let sh = |script: &str| home.ok(["exec", "lean", "sh", "-c", script]);
    // As it lies in the memory of the initial file system, and what of it and of its data is mapped in.
    let size: u64 = sh("wc -c < /proc/1/exe").trim().parse().unwrap();
    assert!((500_000..=4_000_000).contains(&size), "{size} bytes");
    let resident: u64 = sh("awk '/^VmRSS/ { print $2 }' /proc/1/status").parse().unwrap();
    assert!((100..=12 << 10).contains(&resident), "{resident} KiB");

    // An image that has their places, which is what their packages make.
    for (path, kind) in [("/", "overlay"), ("/var/lib/docker", "ext4"), ("/var/lib/containerd", "ext4")] {
        let on = format!("awk '$2 == \"{path}\" {{ print $3 }}' /proc/mounts");
        assert_eq!(sh(&on), kind, "{path}");
    }
    sh(
        "mkdir /var/lib/docker/image /var/lib/containerd/io; echo kept > /var/lib/docker/image/f; echo kept > /var/lib/containerd/io/f",
    );
    // An overlay can be stacked on one directory there, as an engine does, and what it has is there at the next start and in a fork.
    let overlay = "cd /var/lib/docker && mkdir -p lower upper work merged && echo low > lower/f && \
                   mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work none merged && echo up > merged/f && \
                   cat lower/f upper/f && umount merged";
    let ended = home.kiln(["exec", "--privileged", "lean", "sh", "-c", overlay]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "low\nup\n"), "{ended:?}");
    home.ok(["fork", "--disk", "lean", "leaner"]);
    home.ok(["restart", "-t", "0", "lean"]);
    home.ok(["start", "leaner"]);
    for name in ["lean", "leaner"] {
        let shown = home.ok(["exec", name, "cat", "/var/lib/docker/image/f", "/var/lib/containerd/io/f"]);
        assert_eq!(shown, "kept\nkept", "{name}");
    }
    home.ok(["rm", "-f", "lean", "leaner"]);
}
