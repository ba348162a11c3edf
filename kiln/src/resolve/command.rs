//! What is executed: the image's entrypoint and command, and the user's.

use super::{ImageSettings, ResolveError, Result};

/// The command and its arguments.
///
/// As Docker has it: arguments of the user replace the image's `Cmd`; `--entrypoint` replaces the image's
/// `Entrypoint` *and* drops its `Cmd`; `--entrypoint ""` means none.
pub(crate) fn arguments(
    image_name: &str,
    image: &ImageSettings,
    entrypoint: Option<&str>,
    command: &[String],
) -> Result<Vec<String>> {
    let (mut args, default): (Vec<String>, &[String]) = match entrypoint {
        Some("") => (Vec::new(), &[]),
        Some(program) => (vec![program.to_owned()], &[]),
        None => (image.entrypoint.clone(), &image.cmd),
    };
    args.extend_from_slice(if command.is_empty() { default } else { command });
    if args.is_empty() { Err(ResolveError::NoCommand { image: image_name.to_owned() }) } else { Ok(args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entrypoint_and_command_merge_as_docker_merges_them() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        // image entrypoint, image cmd, --entrypoint, arguments, what is run
        let table = [
            ("", "sh", None, "", Some("sh")),
            ("", "sh", None, "ls -l", Some("ls -l")),
            ("/entry", "serve", None, "", Some("/entry serve")),
            ("/entry", "serve", None, "stop", Some("/entry stop")),
            ("/entry", "serve", Some("/bin/sh"), "", Some("/bin/sh")),
            ("/entry", "serve", Some("/bin/sh"), "-c id", Some("/bin/sh -c id")),
            ("/entry", "serve", Some(""), "id", Some("id")),
            ("/entry", "serve", Some(""), "", None),
            ("", "", None, "", None),
        ];
        for (entry, cmd, flag, arguments_typed, expected) in table {
            let image = ImageSettings { entrypoint: words(entry), cmd: words(cmd), ..Default::default() };
            let got = arguments("img", &image, flag, &words(arguments_typed)).ok();
            assert_eq!(got, expected.map(words), "{entry:?} {cmd:?} {flag:?} {arguments_typed:?}");
        }
    }
}
