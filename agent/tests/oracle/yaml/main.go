// What kubectl makes of YAML: a JSON list of texts on stdin, a JSON list of {json, error} on stdout.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"sigs.k8s.io/yaml"
)

type answer struct {
	JSON  json.RawMessage `json:"json"`
	Error string          `json:"error"`
}

func main() {
	var texts []string
	if err := json.NewDecoder(os.Stdin).Decode(&texts); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	answers := make([]answer, len(texts))
	for i, text := range texts {
		read, err := yaml.YAMLToJSON([]byte(text))
		if err != nil {
			answers[i] = answer{JSON: json.RawMessage("null"), Error: err.Error()}
			continue
		}
		answers[i] = answer{JSON: read}
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
