// The oracle of .dockerignore: what moby itself would leave out. One JSON question a line, one JSON answer a line.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// Bytes travel as base64, which is Go's way with []byte.
type question struct {
	Ignore []byte   `json:"ignore"`
	Paths  [][]byte `json:"paths"`
}

type answer struct {
	// The file cannot be used at all.
	Refused bool `json:"refused"`
	// For each path: "out", "in" or "error".
	Verdicts []string `json:"verdicts"`
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	answers := json.NewEncoder(out)
	for lines.Scan() {
		var q question
		if err := json.Unmarshal(lines.Bytes(), &q); err != nil {
			panic(err)
		}
		if err := answers.Encode(judge(q)); err != nil {
			panic(err)
		}
	}
	if err := lines.Err(); err != nil {
		panic(err)
	}
}

func judge(q question) answer {
	patterns, err := ignorefile.ReadAll(bytes.NewReader(q.Ignore))
	if err != nil {
		return answer{Refused: true}
	}
	matcher, err := patternmatcher.New(patterns)
	if err != nil {
		return answer{Refused: true}
	}
	verdicts := make([]string, 0, len(q.Paths))
	for _, path := range q.Paths {
		verdicts = append(verdicts, verdict(matcher, string(path)))
	}
	return answer{Verdicts: verdicts}
}

// As BuildKit's walk does it: each folder on the way hands its matches down.
func verdict(matcher *patternmatcher.PatternMatcher, path string) string {
	var info patternmatcher.MatchInfo
	parts := strings.Split(path, "/")
	matched := false
	for i := range parts {
		var err error
		matched, info, err = matcher.MatchesUsingParentResults(strings.Join(parts[:i+1], "/"), info)
		if err != nil {
			return "error"
		}
	}
	if matched {
		return "out"
	}
	return "in"
}
