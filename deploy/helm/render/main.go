// Render prints what Helm would make of a chart, with the libraries that Helm is made of: Go's own templates, sprig, gojsonschema. It is for the
// test that holds the chart and the plain manifest together, where Helm itself is not to be had, and needs no network: on Debian
//
//	apt install golang-go golang-github-masterminds-sprig-dev golang-github-xeipuuv-gojsonschema-dev golang-github-ghodss-yaml-dev
//	GO111MODULE=off GOPATH=/usr/share/gocode go run deploy/helm/render/main.go deploy/helm/podgate [VALUES.yaml]
//
// It knows no dependencies, hooks, notes or look-ups in a cluster, which the chart does not use. (See pkg/engine of Helm.)
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"github.com/ghodss/yaml"
	"github.com/xeipuuv/gojsonschema"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: render CHART [VALUES.yaml]")
		os.Exit(2)
	}
	if err := render(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func render(chart string, further []string) error {
	values := map[string]interface{}{}
	for _, path := range append([]string{filepath.Join(chart, "values.yaml")}, further...) {
		layer, err := read(path)
		if err != nil {
			return err
		}
		values = merged(values, layer)
	}
	if err := check(filepath.Join(chart, "values.schema.json"), values); err != nil {
		return err
	}
	about, err := read(filepath.Join(chart, "Chart.yaml"))
	if err != nil {
		return err
	}
	// As in Helm, the keys of the chart's description begin with a capital.
	described := map[string]interface{}{}
	for key, value := range about {
		described[strings.ToUpper(key[:1])+key[1:]] = value
	}
	top := map[string]interface{}{
		"Values":  values,
		"Chart":   described,
		"Release": map[string]interface{}{"Name": "podgate", "Namespace": "kube-system", "Service": "Helm"},
	}
	all := template.New("chart").Option("missingkey=zero")
	functions := sprig.TxtFuncMap()
	// Helm takes these away.
	delete(functions, "env")
	delete(functions, "expandenv")
	functions["toYaml"] = func(value interface{}) (string, error) {
		text, err := yaml.Marshal(value)
		return strings.TrimSuffix(string(text), "\n"), err
	}
	functions["include"] = func(name string, data interface{}) (string, error) {
		var text strings.Builder
		err := all.ExecuteTemplate(&text, name, data)
		return text.String(), err
	}
	functions["required"] = func(why string, value interface{}) (interface{}, error) {
		if value == nil || value == "" {
			return value, errors.New(why)
		}
		return value, nil
	}
	all.Funcs(functions)
	paths, err := filepath.Glob(filepath.Join(chart, "templates", "*"))
	if err != nil {
		return err
	}
	sort.Strings(paths)
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if _, err := all.New(filepath.Base(path)).Parse(string(text)); err != nil {
			return err
		}
	}
	for _, path := range paths {
		if filepath.Ext(path) != ".yaml" {
			continue
		}
		var text strings.Builder
		if err := all.ExecuteTemplate(&text, filepath.Base(path), top); err != nil {
			return err
		}
		if strings.TrimSpace(text.String()) != "" {
			fmt.Printf("---\n# Source: %s\n%s\n", filepath.Base(path), strings.TrimSpace(text.String()))
		}
	}
	return nil
}

func read(path string) (map[string]interface{}, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var values map[string]interface{}
	if err := yaml.Unmarshal(text, &values); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return values, nil
}

// Maps are merged, everything else is replaced, and null takes a key away.
func merged(below, above map[string]interface{}) map[string]interface{} {
	for key, value := range above {
		known, isMap := below[key].(map[string]interface{})
		wanted, both := value.(map[string]interface{})
		switch {
		case value == nil:
			delete(below, key)
		case isMap && both:
			below[key] = merged(known, wanted)
		default:
			below[key] = value
		}
	}
	return below
}

func check(path string, values map[string]interface{}) error {
	schema, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text, err := json.Marshal(values)
	if err != nil {
		return err
	}
	result, err := gojsonschema.Validate(gojsonschema.NewBytesLoader(schema), gojsonschema.NewBytesLoader(text))
	if err != nil {
		return err
	}
	var found []string
	for _, problem := range result.Errors() {
		found = append(found, problem.String())
	}
	if len(found) > 0 {
		return fmt.Errorf("values do not meet the schema:\n- %s", strings.Join(found, "\n- "))
	}
	return nil
}
