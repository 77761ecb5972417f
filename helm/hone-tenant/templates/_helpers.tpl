{{- define "tenant.labels" -}}
app.kubernetes.io/name: hone-tenant
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: hone
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* What every trainer pod carries, made by the service or by kubectl: hone/manifests/names.py. */ -}}
{{- define "tenant.trainers" -}}
app.kubernetes.io/part-of: hone
app.kubernetes.io/component: trainer
{{- end }}
