//! Labels: the image's, then files, then flags.

use std::path::PathBuf;

use super::{Host, Map, ResolveError, Result, pair};

/// All labels of a workload.
pub(crate) fn labels(image: &Map, files: &[PathBuf], flags: &[String], host: &Host<'_>) -> Result<Map> {
    let mut all = image.clone();
    for file in files {
        for line in host.lines_of("label file", file)? {
            let (name, value) = pair(line.trim_end());
            all.insert(name.to_owned(), value.to_owned());
        }
    }
    all.extend(label_map("--label", flags)?);
    Ok(all)
}

/// `name=value` words as a map; the last of one name wins.
pub(crate) fn label_map(flag: &'static str, words: &[String]) -> Result<Map> {
    words
        .iter()
        .map(|word| match pair(word) {
            ("", _) => Err(ResolveError::value(flag, word, "it needs a name before the `=`")),
            (name, value) => Ok((name.to_owned(), value.to_owned())),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::with_host;
    use super::*;

    #[test]
    fn flags_win_over_files_and_files_over_the_image() {
        let image = Map::from([
            ("a".into(), "image".into()),
            ("b".into(), "image".into()),
            ("c".into(), "image".into()),
        ]);
        let files = [PathBuf::from("/labels")];
        let flags = ["c=flag".to_owned(), "empty".to_owned()];
        let got =
            with_host(&[("/labels", "b=file\n#x=1\nc=file")], |host| labels(&image, &files, &flags, host))
                .unwrap();
        let shown: Vec<_> = got.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(shown, ["a=image", "b=file", "c=flag", "empty="]);
        assert!(label_map("--label", &["=x".to_owned()]).is_err());
    }
}
