use super::*;

fn from_json(json: &str) -> Result<ExecSpec, Invalid> {
    serde_json::from_str::<Exec>(json).unwrap().validate()
}

#[test]
fn what_the_sdk_sends() {
    let spec =
        from_json(r#"{"cmd":"/bin/sh","args":["-c","echo hello"],"background":false,"timeout_sec":30}"#).unwrap();
    assert_eq!((spec.cmd.as_str(), spec.args.len(), spec.timeout_sec), ("/bin/sh", 2, Some(30)));
    let spec =
        from_json(r#"{"cmd":"/bin/sh","args":["-c","x"],"background":true,"tag":"t","envs":{"A":"1"},"cwd":"repo"}"#)
            .unwrap();
    assert_eq!((spec.timeout_sec, spec.tag.as_deref(), spec.cwd.as_deref()), (None, Some("t"), Some("repo")));
}

#[test]
fn no_timeout_means_thirty_seconds() {
    for json in [r#"{"cmd":"x"}"#, r#"{"cmd":"x","timeout_sec":0}"#, r#"{"cmd":"x","timeout_sec":null}"#] {
        assert_eq!(from_json(json).unwrap().timeout_sec, Some(30), "{json}");
    }
}

#[test]
fn bounds_are_named() {
    let long = "x".repeat(limits::EXEC_STRING_BYTES + 1);
    for (json, field) in [
        (r#"{"cmd":""}"#.to_owned(), "cmd"),
        (r#"{"cmd":"a\u0000b"}"#.to_owned(), "cmd"),
        (r#"{"cmd":"x","timeout_sec":-1}"#.to_owned(), "timeout_sec"),
        (r#"{"cmd":"x","timeout_sec":86401}"#.to_owned(), "timeout_sec"),
        (format!(r#"{{"cmd":"x","args":["a","{long}"]}}"#), "args[1]"),
        (format!(r#"{{"cmd":"x","args":[{}]}}"#, vec!["\"\""; limits::EXEC_ARGS + 1].join(",")), "args"),
        (r#"{"cmd":"x","envs":{"":"v"}}"#.to_owned(), "envs"),
        (r#"{"cmd":"x","envs":{"A=B":"v"}}"#.to_owned(), "envs"),
        (r#"{"cmd":"x","envs":{"A":"v\u0000"}}"#.to_owned(), "envs.A"),
        (format!(r#"{{"cmd":"x","envs":{{"A":"{long}"}}}}"#), "envs"),
        (format!(r#"{{"cmd":"x","envs":{{"{long}":""}}}}"#), "envs"),
        (format!(r#"{{"cmd":"x","cwd":"{long}"}}"#), "cwd"),
        (format!(r#"{{"cmd":"x","tag":"{long}"}}"#), "tag"),
    ] {
        assert_eq!(from_json(&json).unwrap_err().field, field, "{}", &json[..json.len().min(60)]);
    }
}
