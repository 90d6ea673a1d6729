{{- define "podgate.labels" -}}
app.kubernetes.io/name: podgate
{{- end }}

{{- define "podgate.image" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* What a pod knows of its node. */}}
{{- define "podgate.env" -}}
- name: PODGATE_NODE
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: PODGATE_UNDERLAY
  valueFrom: {fieldRef: {fieldPath: status.hostIP}}
{{- if ne .Values.logLevel "info" }}
- name: PODGATE_LOG
  value: {{ .Values.logLevel | quote }}
{{- end }}
{{- end }}

{{/* The port that probes ask. */}}
{{- define "podgate.healthPort" -}}
{{ .Values.config.health.address | splitList ":" | last }}
{{- end }}
